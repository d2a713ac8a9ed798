//! From key blocks to hashed segments without a lock or an allocation.

//! Drivers: from a vendor's hand-over to key blocks.

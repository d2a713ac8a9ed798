//! Key supply agent: keys for applications.

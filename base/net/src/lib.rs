//! Mutually authenticated links and the loop that drives any protocol over them.

//! QKDN controller: routes over the Ck interface.

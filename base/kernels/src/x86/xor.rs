//! The plain loops, compiled for wider registers. Intrinsics gain nothing over this: XOR is bound
//! by memory.

macro_rules! compiled_for {
    ($name:ident, $features:literal) => {
        pub(crate) mod $name {
            use crate::portable;

            #[target_feature(enable = $features)]
            pub(crate) fn xor_in_place(data: &mut [u8], pad: &[u8]) {
                portable::xor_in_place(data, pad);
            }

            #[target_feature(enable = $features)]
            pub(crate) fn xor(out: &mut [u8], a: &[u8], b: &[u8]) {
                portable::xor(out, a, b);
            }

            #[target_feature(enable = $features)]
            pub(crate) fn xor3(out: &mut [u8], a: &[u8], b: &[u8], c: &[u8]) {
                portable::xor3(out, a, b, c);
            }
        }
    };
}

compiled_for!(avx2, "avx2");
compiled_for!(avx512, "avx512f,avx512bw,avx512vl");

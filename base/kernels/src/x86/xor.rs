//! The plain loops, compiled for wider registers. Intrinsics gain nothing over this: XOR is bound
//! by memory, once stores no longer straddle cache lines.

macro_rules! compiled_for {
    ($name:ident, $features:literal) => {
        pub(crate) mod $name {
            use super::unaligned_bytes;
            use crate::portable;

            #[target_feature(enable = $features)]
            pub(crate) fn xor_in_place(data: &mut [u8], pad: &[u8]) {
                let (head, data) = data.split_at_mut(unaligned_bytes(data));
                let (pad_head, pad) = pad.split_at(head.len());
                portable::xor_in_place(head, pad_head);
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

/// How much to do first, so that what follows starts a cache line; 0 where it would not pay.
fn unaligned_bytes(data: &[u8]) -> usize {
    const LINE_BYTES: usize = 64;
    const WORTH_BYTES: usize = 8 * LINE_BYTES;
    if data.len() < WORTH_BYTES {
        return 0;
    }
    data.as_ptr().align_offset(LINE_BYTES).min(data.len())
}

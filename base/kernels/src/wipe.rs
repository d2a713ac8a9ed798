/// Overwrites `bytes` with zeros in a way the compiler may not drop.
///
/// One block write and a barrier, not one volatile store per byte, so wiping runs at the speed of
/// memory.
pub fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    keep_stores(bytes);
}

/// Makes the compiler believe that `bytes` is read here.
#[cfg(all(not(miri), any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn keep_stores(bytes: &mut [u8]) {
    // SAFETY:
    // - The template is a comment: no instruction runs, no register or flag changes.
    // - Without `nomem` the block counts as a reader of all memory that `bytes` exposes, which is
    //   the point: the stores before it must be done.
    unsafe {
        core::arch::asm!("/* {0} */", in(reg) bytes.as_mut_ptr(), options(nostack, preserves_flags));
    }
}

/// Where there is no assembler to hide behind: volatile stores are never dropped.
#[cfg(not(all(not(miri), any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(crate) fn keep_stores(bytes: &mut [u8]) {
    for byte in bytes {
        // SAFETY:
        // - `byte` is a live exclusive reference, so it is valid for writes and aligned.
        unsafe { core::ptr::write_volatile(byte, 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::wipe;

    #[test]
    fn every_byte_is_zero_after_wiping() {
        for len in 0..300 {
            let mut bytes = vec![0xA5; len + 2];
            wipe(&mut bytes[1..=len]);
            assert!(bytes[1..=len].iter().all(|&b| b == 0));
            assert_eq!((bytes[0], bytes[len + 1]), (0xA5, 0xA5));
        }
    }
}

/// Overwrites `bytes` with zeros in a way the compiler may not drop.
///
/// One block write and a barrier, not one volatile store per byte, so wiping runs at the speed of
/// memory.
pub fn wipe(bytes: &mut [u8]) {
    wipe_values(bytes);
}

/// [`wipe`] for numbers of any size.
#[inline]
pub(crate) fn wipe_values<T: Copy + Default>(values: &mut [T]) {
    values.fill(T::default());
    keep_stores(values);
}

/// Makes the compiler believe that `values` is read here.
#[cfg(all(not(miri), any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn keep_stores<T: Copy + Default>(values: &mut [T]) {
    // SAFETY:
    // - The template is a comment: no instruction runs, no register or flag changes.
    // - Without `nomem` the block counts as a reader of all memory that `values` exposes, which is
    //   the point: the stores before it must be done.
    unsafe {
        core::arch::asm!("/* {0} */", in(reg) values.as_mut_ptr(), options(nostack, preserves_flags));
    }
}

/// Where there is no assembler to hide behind: volatile stores are never dropped.
#[cfg(not(all(not(miri), any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(crate) fn keep_stores<T: Copy + Default>(values: &mut [T]) {
    for value in values {
        // SAFETY:
        // - `value` is a live exclusive reference, so it is valid for writes and aligned.
        unsafe { core::ptr::write_volatile(value, T::default()) };
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

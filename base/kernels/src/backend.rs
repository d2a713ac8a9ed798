use crate::health::{self, HealthState, HealthStats};
use crate::portable;
use crate::tag::TagKey;
#[cfg(target_arch = "x86_64")]
use crate::x86;

/// A set of implementations that this CPU is known to support.
///
/// The only constructors beside [`Backend::PORTABLE`] check the CPU, so holding a value *is* the
/// proof that its instructions exist; the `unsafe` calls below rest on nothing else. Choose once,
/// with [`Backend::detect`], and keep the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend(Kind);

/// Each x86 level includes the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    ShaNi,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Backend {
    /// Plain loops, and the crates `sha2` and `polyval` (which look at the CPU on their own).
    /// Always available.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The fastest backend this CPU supports.
    pub fn detect() -> Self {
        Self::all().last().unwrap_or(Self::PORTABLE)
    }

    /// Every backend this CPU supports, the slowest first. For tests and benches.
    pub fn all() -> impl Iterator<Item = Self> {
        [
            Some(Self::PORTABLE),
            Self::avx2(),
            Self::sha_ni(),
            Self::avx512(),
        ]
        .into_iter()
        .flatten()
    }

    /// AVX2, PCLMULQDQ, BMI1 and POPCNT.
    pub fn avx2() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if !cfg!(miri)
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("pclmulqdq")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("popcnt")
        {
            return Some(Self(Kind::Avx2));
        }
        None
    }

    /// [`Backend::avx2`], with the SHA extensions.
    pub fn sha_ni() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if Self::avx2().is_some() && is_x86_feature_detected!("sha") {
            return Some(Self(Kind::ShaNi));
        }
        None
    }

    /// [`Backend::sha_ni`], with AVX-512 F, BW, VL, VBMI2, VPOPCNTDQ and VPCLMULQDQ.
    pub fn avx512() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if Self::sha_ni().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vpopcntdq")
            && is_x86_feature_detected!("vpclmulqdq")
        {
            return Some(Self(Kind::Avx512));
        }
        None
    }

    /// The name for logs and benches.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::ShaNi => "sha_ni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
        }
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }

    /// `data ^= pad`.
    ///
    /// # Panics
    ///
    /// If the lengths differ: a pad is as long as what it covers.
    pub fn xor_in_place(self, data: &mut [u8], pad: &[u8]) {
        assert_eq!(
            data.len(),
            pad.len(),
            "a one-time pad is as long as the data"
        );
        match self.0 {
            Kind::Portable => portable::xor_in_place(data, pad),
            // SAFETY:
            // - `Kind::Avx2` and `Kind::ShaNi` exist only where `Backend::avx2` found AVX2.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::ShaNi => unsafe { x86::xor::avx2::xor_in_place(data, pad) },
            // SAFETY:
            // - `Kind::Avx512` exists only where `Backend::avx512` found AVX-512 F, BW and VL.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { x86::xor::avx512::xor_in_place(data, pad) },
        }
    }

    /// `data ^= pad`, then wipes the pad: what is left cannot be used twice.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    pub fn xor_and_wipe(self, data: &mut [u8], pad: &mut [u8]) {
        assert_eq!(
            data.len(),
            pad.len(),
            "a one-time pad is as long as the data"
        );
        for (data, pad) in data.chunks_mut(L1_BYTES).zip(pad.chunks_mut(L1_BYTES)) {
            self.xor_in_place(data, pad);
            crate::wipe(pad);
        }
    }

    /// `out = a ^ b`.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    pub fn xor(self, out: &mut [u8], a: &[u8], b: &[u8]) {
        assert_eq!(
            (out.len(), out.len()),
            (a.len(), b.len()),
            "operands are of one length"
        );
        match self.0 {
            Kind::Portable => portable::xor(out, a, b),
            // SAFETY:
            // - As in `xor_in_place`.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::ShaNi => unsafe { x86::xor::avx2::xor(out, a, b) },
            // SAFETY:
            // - As in `xor_in_place`.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { x86::xor::avx512::xor(out, a, b) },
        }
    }

    /// `out = a ^ b ^ c`: a relay node that takes one pad off and puts the next one on never shows
    /// the key in between, not even to its own memory.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    pub fn xor3(self, out: &mut [u8], a: &[u8], b: &[u8], c: &[u8]) {
        let len = out.len();
        assert_eq!(
            (len, len, len),
            (a.len(), b.len(), c.len()),
            "operands are of one length"
        );
        match self.0 {
            Kind::Portable => portable::xor3(out, a, b, c),
            // SAFETY:
            // - As in `xor_in_place`.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::ShaNi => unsafe { x86::xor::avx2::xor3(out, a, b, c) },
            // SAFETY:
            // - As in `xor_in_place`.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { x86::xor::avx512::xor3(out, a, b, c) },
        }
    }

    /// SHA-256 (FIPS 180-4) of each of the units that lie end to end in `data`.
    ///
    /// Unit `i` is `data[i * unit_bytes..][..unit_bytes]`, its digest goes to `out[i]`. All units
    /// have one length; a shorter last one is not a unit.
    ///
    /// # Panics
    ///
    /// Unless `data` is exactly `out.len()` units long and `unit_bytes` is at least 1.
    pub fn sha256_units(self, data: &[u8], unit_bytes: usize, out: &mut [[u8; 32]]) {
        assert!(unit_bytes > 0, "a unit has bytes");
        assert_eq!(
            Some(data.len()),
            unit_bytes.checked_mul(out.len()),
            "data is whole units"
        );
        match self.0 {
            // One message alone has no lane beside it to fill.
            _ if out.len() == 1 => portable::sha256_units(data, unit_bytes, out),
            Kind::Portable => portable::sha256_units(data, unit_bytes, out),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => portable::sha256_units(data, unit_bytes, out),
            // SAFETY:
            // - `Kind::ShaNi` exists only where `Backend::sha_ni` found AVX2 and SHA.
            #[cfg(target_arch = "x86_64")]
            Kind::ShaNi => unsafe { x86::sha_ni::sha256_units(data, unit_bytes, out) },
            // SAFETY:
            // - `Kind::Avx512` exists only where `Backend::avx512` found AVX-512 F, BW and VL, and
            //   `Backend::sha_ni` AVX2 and SHA.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { x86::sha_lanes::sha256_units(data, unit_bytes, out) },
        }
    }

    /// Statistics of the next bytes of a stream, for the continuous health tests of NIST
    /// SP 800-90B. Windows and runs go on from the call before.
    pub fn health(self, state: &mut HealthState, data: &[u8]) -> HealthStats {
        match self.0 {
            Kind::Portable => health::health(state, data),
            // SAFETY:
            // - `Kind::Avx2` and `Kind::ShaNi` exist only where `Backend::avx2` found AVX2, BMI1
            //   and POPCNT.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::ShaNi => unsafe { x86::health::avx2(state, data) },
            // SAFETY:
            // - `Kind::Avx512` exists only where `Backend::avx512` found AVX-512 F, BW, VL and
            //   VPOPCNTDQ, and `Backend::avx2` BMI1 and POPCNT.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { x86::health::avx512(state, data) },
        }
    }

    /// Prepares a POLYVAL key for many tags; see [`TagKey`].
    pub fn tag_key(self, h: &[u8; 16]) -> TagKey {
        TagKey::new(self, h)
    }

    /// One tag under a key of its own: [`Backend::tag_key`], then [`TagKey::tag`].
    pub fn tag(self, h: &[u8; 16], aad: &[u8], text: &[u8]) -> [u8; 16] {
        self.tag_key(h).tag(aad, text)
    }
}

/// What `xor_and_wipe` does at a time: data and pad stay in the first-level cache in between.
const L1_BYTES: usize = 8 << 10;

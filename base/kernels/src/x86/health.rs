//! The plain loops, compiled for wider registers and for instructions that count ones.

macro_rules! compiled_for {
    ($name:ident, $features:literal) => {
        #[target_feature(enable = $features)]
        pub(crate) fn $name(state: &mut HealthState, data: &[u8]) -> HealthStats {
            health::health(state, data)
        }
    };
}

use crate::health::{self, HealthState, HealthStats};

compiled_for!(avx2, "avx2,bmi1,popcnt");
compiled_for!(
    avx512,
    "avx512f,avx512bw,avx512vl,avx512vpopcntdq,bmi1,popcnt"
);

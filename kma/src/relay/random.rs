//! Case 2 (Y.3803 clause 9, Fig. 6; C-02): random bits of the source, relayed hop by hop.

use qkd_keyfile::{Entropy, metadata::SecurityLevel};
use qkd_secmem::KeyBuf;

use super::{physical::Physical, source::Departure, unit};
use crate::{
    hop::{self, HopError},
    io::Cx,
    policy::RandomSource,
    record::RelayedWay,
    session::Session,
};

/// Draws the bits of a unit. `None`: the generator has not delivered enough yet, or the link has not
/// enough to spare.
pub(super) fn draw(
    cx: &mut Cx<'_>,
    source: RandomSource,
    departure: &Departure<'_>,
    (entropy, physical): (&mut dyn Entropy, &mut Physical),
) -> Result<(KeyBuf, SecurityLevel), HopError> {
    let len_bytes = departure.len_bytes as usize;
    if source == RandomSource::Qkd {
        let (leg, len) = (departure.leg, departure.len_bytes);
        let level = hop::level_of_link(cx, leg, len).ok_or(HopError::Short)?;
        let bits = hop::take_as_random(cx, leg, len, departure.kma_key_id)?;
        return Ok((bits, level));
    }
    let mut bits = cx
        .store
        .pool()
        .take(len_bytes)
        .map_err(|_| HopError::Memory)?;
    match source {
        RandomSource::System => {
            entropy.fill(bits.expose_mut());
            Ok((bits, SecurityLevel::Any))
        }
        _ if physical.fill(cx, bits.expose_mut()) => Ok((bits, SecurityLevel::Qkd)),
        _ => Err(HopError::Short),
    }
}

/// Sends a unit of random bits to the first hop.
pub(super) fn depart(
    cx: &mut Cx<'_>,
    session: &mut Session,
    departure: &Departure<'_>,
    (bits, level): (KeyBuf, SecurityLevel),
) -> Result<(KeyBuf, SecurityLevel), HopError> {
    let method = hop::method(cx, session, departure.leg, bits.len_bytes());
    let method = method.ok_or(HopError::Short)?;
    let way = RelayedWay::of_level(level);
    let (route, id) = (departure.leg.route, departure.kma_key_id);
    let first = unit::metadata(cx, route, id, bits.len_bytes(), way);
    let metadata = unit::one_hop_on(cx, first, route, method);
    let level = metadata.level;
    let file = unit::key_file(cx, metadata, bits.expose()).ok_or(HopError::Memory)?;
    hop::send(cx, session, departure.leg, method, file)?;
    Ok((bits, level))
}

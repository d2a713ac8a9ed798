//! Case 1 (Y.3803 clause 9, Fig. 5; C-01): the key of the first link, relayed from its far end on.
//!
//! The source reserves a range of the link with the second node of the route: from then on it is pad
//! for nobody, at both ends. The second node relays it, under pad of its own next link, as the source
//! of the relay; what the source keeps is the same bits, against which the destination's completion
//! is checked.

use qkd_keyfile::metadata::SecurityLevel;
use qkd_secmem::KeyBuf;

use super::{source::Departure, unit};
use crate::{
    hop::{self, HopError},
    io::Cx,
    record::RelayedWay,
    session::Session,
    wire::{RelayHeader, Reservation, ReservedFor},
};

/// Reserves a unit on the first link.
pub(super) fn depart(
    cx: &mut Cx<'_>,
    session: &mut Session,
    departure: &Departure<'_>,
) -> Result<(KeyBuf, SecurityLevel), HopError> {
    let (leg, len) = (departure.leg, departure.len_bytes);
    let level = hop::level_of_link(cx, leg, len).ok_or(HopError::Short)?;
    let reservation = Reservation {
        relay: departure.kma_key_id,
        scheme: ReservedFor::LinkKey,
        way: RelayedWay::of_level(level),
    };
    let (bits, _) = hop::reserve(cx, session, leg, len, reservation)?;
    Ok((bits, level))
}

/// The second node holds a reservation: its bits become a key file that is relayed from here.
pub(super) fn reserved(
    cx: &Cx<'_>,
    header: &RelayHeader,
    reservation: &Reservation,
    bits: &KeyBuf,
) -> Option<KeyBuf> {
    let (route, id) = (&header.route, reservation.relay);
    let way = reservation.way.clone();
    let metadata = unit::metadata(cx, route, id, bits.len_bytes(), way);
    unit::key_file(cx, metadata, bits.expose())
}

//! Fields of a later protocol: a hop passes on what it does not know, as upstream's programs do
//! (spec/control-plane.md 2.5).

use std::fmt;

use prost::{
    DecodeError,
    bytes::{Buf, BufMut},
    encoding::{DecodeContext, WireType, bytes, fixed32, fixed64, skip_field, uint64},
};

/// What came in a message beside the fields that this version has, as it came. The types' `build.rs` gives every
/// message that is passed on a place for it, as a `oneof` of all the numbers up to 255 that are free: upstream counts
/// its fields from 1 and has got to 11. Numbers above, and groups, are dropped.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Unknown(Box<[u8]>);

impl Unknown {
    /// How many bytes it takes on the wire.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        self.0.len()
    }

    /// Writes it as it came.
    pub fn encode(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    /// Takes in one more field.
    ///
    /// # Errors
    /// It does not hold what its key says.
    pub fn merge(
        field: &mut Option<Self>,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        macro_rules! keep {
            ($kind:ident, $type:ty) => {{
                let mut value = <$type>::default();
                $kind::merge(wire_type, &mut value, buf, ctx)?;
                let mut kept = field.take().map_or_else(Vec::new, |kept| kept.0.into_vec());
                $kind::encode(tag, &value, &mut kept);
                *field = Some(Self(kept.into()));
            }};
        }
        match wire_type {
            WireType::Varint => keep!(uint64, u64),
            WireType::SixtyFourBit => keep!(fixed64, u64),
            WireType::ThirtyTwoBit => keep!(fixed32, u32),
            WireType::LengthDelimited => keep!(bytes, Vec<u8>),
            WireType::StartGroup | WireType::EndGroup => skip_field(wire_type, tag, buf, ctx)?,
        }
        Ok(())
    }
}

/// Nobody knows what it is, so nobody knows that it is no secret.
impl fmt::Debug for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use crate::pb::connection::{Connection, Mechanism};

    #[test]
    fn fields_of_a_later_version_are_kept_whatever_they_are() {
        let mechanism = Mechanism { cls: "LOCAL".into(), ..Mechanism::default() };
        // 10: a number, 11: 64 bits, 12: a text, 13: 32 bits, 255: a text; 12 once more.
        let later = b"\x50\x07\x59abcdefgh\x62\x03new\x6dABCD\xfa\x0f\x01x\x62\x05again";
        let mut bytes = later.to_vec();
        bytes.extend(mechanism.encode_to_vec());
        let kept = Mechanism::decode(&bytes[..]).unwrap();
        assert_eq!((kept.cls.as_str(), kept.encoded_len()), ("LOCAL", bytes.len()));
        assert!(
            kept.encode_to_vec().windows(later.len()).any(|part| part == later),
            "in order, as they came"
        );
        assert_eq!(Mechanism::decode(&kept.encode_to_vec()[..]).unwrap(), kept);
        assert!(!format!("{kept:?}").contains("again"), "{kept:?}");
        // Deep in a message as at its top.
        let conn = Connection { mechanism: Some(kept), ..Connection::default() };
        assert_eq!(Connection::decode(&conn.encode_to_vec()[..]).unwrap(), conn);
    }

    #[test]
    fn fields_that_lie_are_refused_and_groups_are_dropped() {
        for bad in
            [&b"\x62\x7fshort"[..], b"\x59abc", b"\x50\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x54"]
        {
            assert!(Mechanism::decode(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Mechanism::decode(&b"\x53\x08\x01\x54"[..]).unwrap(), Mechanism::default());
    }
}

//! Fields of a later protocol: a hop passes on what it does not know, as upstream's programs do
//! (spec/control-plane.md 2.5).

use std::fmt;

use prost::{
    DecodeError,
    bytes::{Buf, BufMut},
    encoding::{DecodeContext, WireType, bytes, fixed32, fixed64, skip_field, uint64},
};

/// What came in a message beside the fields that this version has, as it came. The types' `build.rs` gives every
/// message that is passed on a place for it, as a `oneof` of all the numbers that are free and that a key of two bytes
/// can hold, up to 2047: upstream counts its fields from 1 and has got to 11. Numbers above, and groups, are dropped.
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

    use crate::pb::{
        connection::{Connection, Mechanism, Path, PathSegment},
        connectioncontext::{ConnectionContext, DnsConfig, DnsContext, IpContext, IpNeighbor, Route},
        registry::{
            Destination, Match, Metadata, NetworkService, NetworkServiceEndpoint, NetworkServiceLabels,
        },
    };

    #[test]
    fn fields_of_a_later_version_are_kept_whatever_they_are() {
        let mechanism = Mechanism { cls: "LOCAL".into(), ..Mechanism::default() };
        // 10: a number, 11: 64 bits, 12: a text, 13: 32 bits, 255 and 2047: texts; 12 once more.
        let later = b"\x50\x07\x59abcdefgh\x62\x03new\x6dABCD\xfa\x0f\x01x\xfa\x7f\x01y\x62\x05again";
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

    /// One field that nobody knows is added to every message inside of what hops pass on, the innermost ones too.
    #[test]
    fn no_message_is_too_deep_to_keep_what_it_holds() {
        const LATER: &[u8] = b"\xfa\x7f\x05later";
        fn later<M: prost::Message + Default>(message: M) -> M {
            let mut bytes = message.encode_to_vec();
            bytes.extend(LATER);
            M::decode(&bytes[..]).unwrap()
        }
        fn kept<M: prost::Message + Default + std::fmt::Debug>(message: &M, messages: usize) {
            let passed_on = M::decode(&message.encode_to_vec()[..]).unwrap().encode_to_vec();
            let found = passed_on.windows(LATER.len()).filter(|part| *part == LATER).count();
            assert_eq!(found, messages, "{message:?}");
        }
        let ip = IpContext {
            src_routes: vec![later(Route::default())],
            ip_neighbors: vec![later(IpNeighbor::default())],
            ..IpContext::default()
        };
        let dns = DnsContext { configs: vec![later(DnsConfig::default())], ..DnsContext::default() };
        let context = ConnectionContext {
            ip_context: Some(later(ip)),
            dns_context: Some(later(dns)),
            ..ConnectionContext::default()
        };
        let path = Path { path_segments: vec![later(PathSegment::default())], ..Path::default() };
        let conn =
            Connection { context: Some(later(context)), path: Some(later(path)), ..Connection::default() };
        kept(&later(conn), 9);

        let matched = Match {
            routes: vec![later(Destination::default())],
            metadata: Some(later(Metadata::default())),
            ..Match::default()
        };
        kept(&later(NetworkService { matches: vec![later(matched)], ..NetworkService::default() }), 4);
        let labels = [("s".to_owned(), later(NetworkServiceLabels::default()))].into();
        let endpoint = NetworkServiceEndpoint { network_service_labels: labels, ..Default::default() };
        kept(&later(endpoint), 2);
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

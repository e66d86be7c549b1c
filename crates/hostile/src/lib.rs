//! For tests: messages as only a broken or hostile peer sends them.
//!
//! [`Schema`] knows every message from its descriptors, so a field that is added is mangled too without anybody
//! thinking of it. A good message is read into a tree, one place of it is changed, and the tree is written again: what
//! comes out is bytes that no generated type could produce (two values for one field, text where a number belongs, a
//! length that lies), and the same for the same input.

use std::collections::BTreeMap;

use prost::{
    DecodeError, Message as _,
    encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint},
};
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use rand::{Rng, RngExt};

/// The messages of a set of `.proto` files.
#[derive(Debug)]
pub struct Schema(BTreeMap<String, DescriptorProto>);

/// One message that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mangled {
    /// Which field was changed, and how: for the report of a test.
    pub what: String,
    /// The message as it goes over the wire.
    pub bytes: Vec<u8>,
}

/// A place in a message: field numbers from its root.
type Place = Vec<FieldDescriptorProto>;

#[derive(Debug, Clone)]
struct Field {
    number: u32,
    value: Value,
}

#[derive(Debug, Clone)]
enum Value {
    Varint(u64),
    Fixed32([u8; 4]),
    Fixed64([u8; 8]),
    Bytes(Vec<u8>),
    Message(Vec<Field>),
    /// Written as it is, without a key of its own.
    Raw(Vec<u8>),
}

/// What may be done to a field: its name, and the change of the message that the field is in.
type Change = (&'static str, fn(&FieldDescriptorProto, &mut Vec<Field>));

const CHANGES: &[Change] = &[
    ("missing", |field, message| message.retain(|f| f.number != number(field))),
    ("empty", |field, message| put(field, message, Value::Bytes(Vec::new()))),
    ("zero", |field, message| put(field, message, Value::Varint(0))),
    ("minus one", |field, message| put(field, message, Value::Varint(u64::MAX))),
    ("2^31", |field, message| put(field, message, Value::Varint(1 << 31))),
    ("2^32-1", |field, message| put(field, message, Value::Varint(u64::from(u32::MAX)))),
    ("2^63", |field, message| put(field, message, Value::Varint(1 << 63))),
    ("fixed32", |field, message| put(field, message, Value::Fixed32([0xff; 4]))),
    ("fixed64", |field, message| put(field, message, Value::Fixed64([0x7f; 8]))),
    ("a text", |field, message| text(field, message, "text")),
    ("64 KiB", |field, message| put(field, message, Value::Bytes(vec![b'x'; 64 * 1024]))),
    ("unicode", |field, message| text(field, message, "Zähler\u{202e}😀\u{0}\u{301}\u{feff}")),
    ("control", |field, message| text(field, message, "\r\n\x1b[31m2026-01-01 INFO root logged in\x07")),
    ("no UTF-8", |field, message| put(field, message, Value::Bytes(vec![0xff, 0xfe, 0xc0, 0x80, 0xf5]))),
    ("a path", |field, message| text(field, message, "../../../../proc/self/mem")),
    ("a format", |field, message| text(field, message, "%s%n{}{0}$(id)`id`';--")),
    ("-1", |field, message| text(field, message, "-1")),
    ("an address", |field, message| text(field, message, "999.1.1.1/33")),
    ("a wide prefix", |field, message| text(field, message, "::/0")),
    ("inode://", |field, message| text(field, message, "inode://18446744073709551616/-1")),
    ("file://", |field, message| text(field, message, "file:///proc/1/ns/net")),
    ("twice", |field, message| {
        let same: Vec<_> = message.iter().filter(|f| f.number == number(field)).cloned().collect();
        message.extend(same);
        add(field, message, Value::Bytes(b"\x0a\x01a\x12\x01b".to_vec()));
        add(field, message, Value::Bytes(b"\x0a\x01a\x12\x01c".to_vec()));
    }),
    ("5000 times", |field, message| {
        let one = message.iter().find(|f| f.number == number(field)).cloned();
        let one = one.unwrap_or(Field { number: number(field), value: Value::Bytes(Vec::new()) });
        message.extend(std::iter::repeat_n(one, 5000));
    }),
    ("5000 keys", |field, message| {
        for i in 0..5000u32 {
            let mut entry = Vec::new();
            write(&[Field { number: 1, value: Value::Bytes(i.to_string().into_bytes()) }], &mut entry);
            add(field, message, Value::Bytes(entry));
        }
    }),
    ("a long length", |field, message| {
        let mut raw = Vec::new();
        encode_key(number(field), WireType::LengthDelimited, &mut raw);
        encode_varint(u64::from(u32::MAX), &mut raw);
        message.push(Field { number: number(field), value: Value::Raw(raw) });
    }),
    ("an endless number", |field, message| {
        let mut raw = Vec::new();
        encode_key(number(field), WireType::Varint, &mut raw);
        raw.extend([0xff; 12]);
        message.push(Field { number: number(field), value: Value::Raw(raw) });
    }),
    ("deep groups", |field, message| {
        let mut raw = Vec::new();
        for _ in 0..500 {
            encode_key(number(field), WireType::StartGroup, &mut raw);
        }
        message.push(Field { number: number(field), value: Value::Raw(raw) });
    }),
    ("deep messages", |field, message| {
        let mut inner = Vec::new();
        for _ in 0..300 {
            let mut outer = Vec::new();
            write(&[Field { number: 1, value: Value::Bytes(inner) }], &mut outer);
            inner = outer;
        }
        put(field, message, Value::Bytes(inner));
    }),
    ("unknown fields beside it", |_, message| {
        for number in [999, 19_000, 536_870_911] {
            message.push(Field { number, value: Value::Bytes(vec![7; 100]) });
        }
    }),
];

// === impl Schema ===

impl Schema {
    /// Reads a `FileDescriptorSet`.
    ///
    /// # Errors
    /// It is not one.
    pub fn new(descriptors: &[u8]) -> Result<Self, DecodeError> {
        let mut messages = BTreeMap::new();
        for file in FileDescriptorSet::decode(descriptors)?.file {
            for message in file.message_type {
                collect(file.package.as_deref().unwrap_or_default(), message, &mut messages);
            }
        }
        Ok(Self(messages))
    }

    /// The full names of all messages, but for the entries of maps.
    pub fn messages(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|(_, message)| !is_entry(message)).map(|(name, _)| name.as_str())
    }

    /// A message in which every field, at every depth, has a value; texts and bytes are what `text` says of the field's
    /// name, `None` for the keys and values of maps.
    ///
    /// # Panics
    /// There is no such message.
    #[must_use]
    pub fn filled(&self, message: &str, text: &dyn Fn(Option<&str>) -> String) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&self.fill(message, text), &mut bytes);
        bytes
    }

    /// `good` with every change to every field at every depth, one at a time.
    ///
    /// # Panics
    /// There is no such message, or `good` is not one.
    pub fn mangled<'a>(&'a self, message: &'a str, good: &[u8]) -> impl Iterator<Item = Mangled> + 'a {
        let tree = self.read(message, good).expect("a good message");
        let places = self.places(message);
        places.into_iter().flat_map(move |place| {
            let tree = tree.clone();
            CHANGES.iter().map(move |(how, change)| {
                let mut tree = tree.clone();
                apply(&place, *change, &mut tree);
                let mut bytes = Vec::new();
                write(&tree, &mut bytes);
                Mangled { what: format!("{message}.{}: {how}", dotted(&place)), bytes }
            })
        })
    }

    /// `good` with a few changes at once, and sometimes cut or with a byte changed: as chance will have it.
    ///
    /// # Panics
    /// There is no such message, or `good` is not one.
    pub fn at_random(&self, message: &str, good: &[u8], chance: &mut impl Rng) -> Mangled {
        let mut tree = self.read(message, good).expect("a good message");
        let places = self.places(message);
        let mut what = Vec::new();
        for _ in 0..chance.random_range(1..=4) {
            let (how, change) = CHANGES[chance.random_range(0..CHANGES.len())];
            if let Some(place) = places.get(chance.random_range(0..places.len().max(1))) {
                apply(place, change, &mut tree);
                what.push(format!("{}: {how}", dotted(place)));
            }
        }
        let mut bytes = Vec::new();
        write(&tree, &mut bytes);
        if !bytes.is_empty() {
            let at = chance.random_range(0..bytes.len());
            match chance.random_range(0..4) {
                0 => {
                    bytes.truncate(at);
                    what.push(format!("cut at {at}"));
                }
                1 => {
                    bytes[at] ^= 1 << chance.random_range(0..8);
                    what.push(format!("a bit of byte {at}"));
                }
                _ => {}
            }
        }
        Mangled { what: format!("{message}: {}", what.join(", ")), bytes }
    }

    fn fill(&self, message: &str, text: &dyn Fn(Option<&str>) -> String) -> Vec<Field> {
        let message = self.get(message);
        let fill = |field: &FieldDescriptorProto| {
            let named = (!is_entry(message)).then(|| field.name());
            let value = match field.r#type() {
                Type::Message => Value::Message(self.fill(type_name(field), text)),
                Type::String | Type::Bytes => Value::Bytes(text(named).into_bytes()),
                Type::Fixed32 | Type::Sfixed32 | Type::Float => Value::Fixed32([1; 4]),
                Type::Fixed64 | Type::Sfixed64 | Type::Double => Value::Fixed64([1; 8]),
                _ => Value::Varint(1),
            };
            Field { number: number(field), value }
        };
        message.field.iter().map(fill).collect()
    }

    /// Every field that can be reached from the root; messages within themselves are entered once.
    fn places(&self, message: &str) -> Vec<Place> {
        let (mut places, mut open) = (Vec::new(), vec![(message.to_owned(), Place::new())]);
        while let Some((message, before)) = open.pop() {
            for field in &self.get(&message).field {
                let place = [&before[..], std::slice::from_ref(field)].concat();
                let seen =
                    before.iter().any(|f| f.r#type() == Type::Message && f.type_name == field.type_name);
                if field.r#type() == Type::Message && !seen {
                    open.push((type_name(field).to_owned(), place.clone()));
                }
                places.push(place);
            }
        }
        places
    }

    fn read(&self, message: &str, mut bytes: &[u8]) -> Result<Vec<Field>, DecodeError> {
        let fields = &self.get(message).field;
        let mut tree = Vec::new();
        while !bytes.is_empty() {
            let (number, wire) = decode_key(&mut bytes)?;
            let value = match wire {
                WireType::Varint => Value::Varint(decode_varint(&mut bytes)?),
                WireType::ThirtyTwoBit => Value::Fixed32(take(&mut bytes, 4).try_into().expect("four")),
                WireType::SixtyFourBit => Value::Fixed64(take(&mut bytes, 8).try_into().expect("eight")),
                WireType::LengthDelimited => {
                    let length = decode_varint(&mut bytes)?;
                    let inner = take(&mut bytes, length as usize);
                    match fields.iter().find(|f| f.number() as u32 == number) {
                        Some(field) if field.r#type() == Type::Message => {
                            Value::Message(self.read(type_name(field), inner)?)
                        }
                        _ => Value::Bytes(inner.to_vec()),
                    }
                }
                WireType::StartGroup | WireType::EndGroup => panic!("proto3 has no groups"),
            };
            tree.push(Field { number, value });
        }
        Ok(tree)
    }

    fn get(&self, message: &str) -> &DescriptorProto {
        self.0.get(message).unwrap_or_else(|| panic!("no message {message}"))
    }
}

fn collect(scope: &str, message: DescriptorProto, all: &mut BTreeMap<String, DescriptorProto>) {
    let name =
        if scope.is_empty() { message.name().to_owned() } else { format!("{scope}.{}", message.name()) };
    for nested in message.nested_type.clone() {
        collect(&name, nested, all);
    }
    all.insert(name, message);
}

fn is_entry(message: &DescriptorProto) -> bool {
    message.options.as_ref().is_some_and(|options| options.map_entry())
}

fn number(field: &FieldDescriptorProto) -> u32 {
    field.number().unsigned_abs()
}

fn type_name(field: &FieldDescriptorProto) -> &str {
    field.type_name().trim_start_matches('.')
}

fn dotted(place: &Place) -> String {
    place.iter().map(FieldDescriptorProto::name).collect::<Vec<_>>().join(".")
}

/// Goes to the message that holds the field, making what is not there, and changes it.
fn apply(
    place: &[FieldDescriptorProto],
    change: fn(&FieldDescriptorProto, &mut Vec<Field>),
    tree: &mut Vec<Field>,
) {
    let Some((field, deeper)) = place.split_first() else { return };
    if deeper.is_empty() {
        return change(field, tree);
    }
    let number = number(field);
    if !tree.iter().any(|f| f.number == number && matches!(f.value, Value::Message(_))) {
        tree.push(Field { number, value: Value::Message(Vec::new()) });
    }
    let inner = tree.iter_mut().find_map(|f| match &mut f.value {
        Value::Message(inner) if f.number == number => Some(inner),
        _ => None,
    });
    apply(deeper, change, inner.expect("made above"));
}

/// A value in place of the field's, or of the first of a repeated one.
fn put(field: &FieldDescriptorProto, message: &mut Vec<Field>, value: Value) {
    match message.iter_mut().find(|f| f.number == number(field)) {
        Some(is) => is.value = value,
        None => add(field, message, value),
    }
}

fn add(field: &FieldDescriptorProto, message: &mut Vec<Field>, value: Value) {
    message.push(Field { number: number(field), value });
}

/// A text; for a map, an entry with it as key and value.
fn text(field: &FieldDescriptorProto, message: &mut Vec<Field>, text: &str) {
    let text = Value::Bytes(text.as_bytes().to_vec());
    let entry = || {
        Value::Message(vec![
            Field { number: 1, value: text.clone() },
            Field { number: 2, value: text.clone() },
        ])
    };
    let is_map = field.label() == Label::Repeated && field.r#type() == Type::Message;
    put(field, message, if is_map { entry() } else { text.clone() });
}

fn take<'b>(bytes: &mut &'b [u8], length: usize) -> &'b [u8] {
    let (taken, rest) = bytes.split_at(length);
    *bytes = rest;
    taken
}

fn write(fields: &[Field], out: &mut Vec<u8>) {
    for Field { number, value } in fields {
        match value {
            Value::Varint(value) => {
                encode_key(*number, WireType::Varint, out);
                encode_varint(*value, out);
            }
            Value::Fixed32(value) => {
                encode_key(*number, WireType::ThirtyTwoBit, out);
                out.extend(value);
            }
            Value::Fixed64(value) => {
                encode_key(*number, WireType::SixtyFourBit, out);
                out.extend(value);
            }
            Value::Bytes(bytes) => {
                encode_key(*number, WireType::LengthDelimited, out);
                encode_varint(bytes.len() as u64, out);
                out.extend(bytes);
            }
            Value::Message(fields) => {
                let mut inner = Vec::new();
                write(fields, &mut inner);
                encode_key(*number, WireType::LengthDelimited, out);
                encode_varint(inner.len() as u64, out);
                out.extend(inner);
            }
            Value::Raw(bytes) => out.extend(bytes),
        }
    }
}

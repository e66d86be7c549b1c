//! The path of a registration: who asked whom, as tokens in the RPC header `path`.
//!
//! It is upstream's JSON to the letter (spec/registry.md 2.9.1), and it is not the path of a
//! connection: its segments have only a token. Every server on the way replaces the caller's token
//! by the one addressed to itself and appends its own ([`RegistrationPath::step`], 2.9.2); the index
//! is put back on the way out.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

/// The metadata key, in requests and in the *initial* metadata of responses.
pub const HEADER: &str = "path";

/// More hops than registrations take: five between three domains.
pub const MAX_SEGMENTS: usize = 32;

/// Tokens of a registration, first hop first. `Debug` does not show them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RegistrationPath {
    /// The segment of the one who speaks.
    pub index: usize,
    /// JWTs; an empty text is a segment without one.
    pub tokens: Vec<String>,
}

/// Why a path header cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Not JSON.
    #[error("the path header is not JSON (column {column})")]
    Json {
        /// Where reading stopped.
        column: usize,
    },
    /// JSON of another shape.
    #[error("the path header's {0}")]
    Shape(&'static str),
    /// See [`MAX_SEGMENTS`].
    #[error("the path header has {0} segments; at most {MAX_SEGMENTS} are accepted")]
    TooLong(usize),
    /// The index points behind the last segment. The text is upstream's.
    #[error("Path.Index+1=={next} should be less or equal len(Path.PathSegments)=={len}")]
    IndexPastEnd {
        /// index + 1
        next: usize,
        /// How many segments there are.
        len: usize,
    },
}

impl RegistrationPath {
    /// Reads the header as Go does: names of members in any case, unknown members ignored, the last
    /// of a repeated member counts, null for no or an empty segment.
    ///
    /// # Errors
    /// Not such JSON.
    pub fn decode(header: &str) -> Result<Self, PathError> {
        let value: Value =
            serde_json::from_str(header).map_err(|error| PathError::Json { column: error.column() })?;
        let mut path = Self::default();
        match value {
            Value::Null => return Ok(path),
            Value::Object(members) => {
                for (name, value) in members {
                    if name.eq_ignore_ascii_case("Index") && !value.is_null() {
                        let index = value.as_u64().and_then(|index| u32::try_from(index).ok());
                        path.index =
                            index.ok_or(PathError::Shape("Index is not an unsigned number"))? as usize;
                    } else if name.eq_ignore_ascii_case("PathSegments") {
                        path.tokens = segments(value)?;
                    }
                }
            }
            _ => return Err(PathError::Shape("content is not an object")),
        }
        Ok(path)
    }

    /// Writes the header, with upstream's names and order.
    #[must_use]
    pub fn encode(&self) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Path<'a> {
            index: usize,
            path_segments: Option<Vec<Segment<'a>>>,
        }
        #[derive(Serialize)]
        struct Segment<'a> {
            token: &'a str,
        }
        let segments: Vec<_> = self.tokens.iter().map(|token| Segment { token }).collect();
        let path = Path { index: self.index, path_segments: (!segments.is_empty()).then_some(segments) };
        // Numbers and texts always serialise.
        serde_json::to_string(&path).unwrap_or_default()
    }

    /// Makes this process the current segment: `caller` is the token that came with the call, `own`
    /// is ours for the caller. Returns the index to put back on the way out. What followed our
    /// segment is dropped: it is from a time when the registration took another way, and its tokens
    /// would expire unrenewed.
    ///
    /// # Errors
    /// The index points behind the last segment.
    pub fn step(&mut self, caller: &str, own: &str) -> Result<usize, PathError> {
        let asker = if self.tokens.is_empty() {
            self.tokens.push(caller.to_owned());
            0
        } else {
            let past_end = PathError::IndexPastEnd { next: self.index + 1, len: self.tokens.len() };
            *self.tokens.get_mut(self.index).ok_or(past_end)? = caller.to_owned();
            self.index
        };
        self.index = asker + 1;
        self.tokens.truncate(self.index);
        self.tokens.push(own.to_owned());
        Ok(asker)
    }
}

fn segments(value: Value) -> Result<Vec<String>, PathError> {
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) if list.len() > MAX_SEGMENTS => return Err(PathError::TooLong(list.len())),
        Value::Array(list) => list,
        _ => return Err(PathError::Shape("PathSegments is not a list")),
    };
    let token = |segment| match segment {
        Value::Null => Ok(String::new()),
        Value::Object(members) => {
            let mut token = String::new();
            for (_, value) in members.into_iter().filter(|(name, _)| name.eq_ignore_ascii_case("token")) {
                match value {
                    Value::String(text) => token = text,
                    Value::Null => {}
                    _ => return Err(PathError::Shape("token is not a text")),
                }
            }
            Ok(token)
        }
        _ => Err(PathError::Shape("PathSegments holds something that is not an object")),
    };
    list.into_iter().map(token).collect()
}

impl fmt::Debug for RegistrationPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrationPath")
            .field("index", &self.index)
            .field("segments", &self.tokens.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(index: usize, tokens: &[&str]) -> RegistrationPath {
        RegistrationPath { index, tokens: tokens.iter().map(|t| (*t).to_owned()).collect() }
    }

    #[test]
    fn the_json_is_upstreams() {
        assert_eq!(path(0, &[]).encode(), r#"{"Index":0,"PathSegments":null}"#);
        assert_eq!(
            path(1, &["a", "b"]).encode(),
            r#"{"Index":1,"PathSegments":[{"token":"a"},{"token":"b"}]}"#
        );
        for (text, expected) in [
            (r#"{"Index":0,"PathSegments":null}"#, path(0, &[])),
            (r#"{"Index":1,"PathSegments":[{"token":"a"},{"token":"b"}]}"#, path(1, &["a", "b"])),
            (
                r#"{"index":1,"PATHSEGMENTS":[{"Token":"a"},null,{}, {"token":null,"x":1}],"more":[]}"#,
                path(1, &["a", "", "", ""]),
            ),
            ("{}", path(0, &[])),
            ("null", path(0, &[])),
        ] {
            assert_eq!(RegistrationPath::decode(text), Ok(expected), "{text}");
        }
        for (text, error) in [
            ("", "not JSON"),
            ("[]", "not an object"),
            (r#"{"Index":-1}"#, "unsigned"),
            (r#"{"Index":1.5}"#, "unsigned"),
            (r#"{"Index":4294967296}"#, "unsigned"),
            (r#"{"PathSegments":{}}"#, "not a list"),
            (r#"{"PathSegments":["a"]}"#, "not an object"),
            (r#"{"PathSegments":[{"token":5}]}"#, "not a text"),
        ] {
            let found = RegistrationPath::decode(text).expect_err(text).to_string();
            assert!(found.contains(error), "{text}: {found}");
        }
        let long = format!(r#"{{"PathSegments":[{}]}}"#, vec!["null"; 33].join(","));
        assert_eq!(RegistrationPath::decode(&long), Err(PathError::TooLong(33)));
        assert!(!format!("{:?}", path(0, &["secret"])).contains("secret"));
    }

    #[test]
    fn steps_are_those_of_the_worked_example() {
        // spec/registry.md 2.9.2: client c -> manager n -> registry r
        let mut at_n = RegistrationPath::default();
        assert_eq!(at_n.step("C>n", "N>c"), Ok(0));
        assert_eq!(at_n, path(1, &["C>n", "N>c"]));
        let mut at_r = at_n.clone();
        assert_eq!(at_r.step("N>r", "R>n"), Ok(1));
        assert_eq!(at_r, path(2, &["C>n", "N>r", "R>n"]));
        // a refresh replays the answered path, with all segments
        let mut again = path(0, &["C>n", "N>r", "R>n"]);
        assert_eq!(again.step("C2>n", "N2>c"), Ok(0));
        assert_eq!(again, path(1, &["C2>n", "N2>c"]));
        assert_eq!(path(2, &["a", "b"]).step("x", "y"), Err(PathError::IndexPastEnd { next: 3, len: 2 }));
    }

    proptest::proptest! {
        #[test]
        fn decoding_never_panics_and_gives_back_what_was_encoded(
            junk in "[{}\\[\\]\",:a-zA-Z0-9 ]{0,40}",
            index in 0..40_usize,
            tokens in proptest::collection::vec("[a-zA-Z0-9._-]{0,20}", 0..8),
        ) {
            let _ = RegistrationPath::decode(&junk);
            let path = RegistrationPath { index, tokens };
            proptest::prop_assert_eq!(RegistrationPath::decode(&path.encode()), Ok(path.clone()));
            let mut stepped = path;
            if let Ok(asker) = stepped.step("c", "o") {
                proptest::prop_assert_eq!((stepped.index, stepped.tokens.len()), (asker + 1, asker + 2));
            }
        }
    }
}

//! The path of a connection: who handed the request to whom (spec/control-plane.md section 4).
//!
//! Every hop runs [`step`] on the way in, and [`restore`] on the way back. Ids are drawn by the caller, so
//! that tests and simulations decide them.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost_types::Timestamp;

use crate::pb::connection::{Connection, Path, PathSegment, State};

/// More hops than any mesh has: two domains with a chain of ten functions need 48.
pub const MAX_SEGMENTS: usize = 128;

/// Why a path cannot be continued. The texts are upstream's, which its users know from their logs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The index points behind the last segment.
    #[error("Path.Index+1=={next} should be less or equal len(Path.PathSegments)=={len}")]
    IndexPastEnd {
        /// index + 1
        next: u64,
        /// number of segments
        len: usize,
    },
    /// The sender's id is not the one of the segment that it claims to be.
    #[error("Current PathSegment.Id=={segment:?} should be equal Connection.Id=={connection:?}")]
    ForeignId {
        /// id of the segment at `index`
        segment: String,
        /// id of the connection
        connection: String,
    },
    /// See [`MAX_SEGMENTS`].
    #[error("the path has {0} segments; at most {MAX_SEGMENTS} are accepted")]
    TooLong(usize),
    /// An answer that does not hold the asker's own segment.
    #[error("the answer's path has {len} segments, but this hop is segment {index}")]
    Cut {
        /// this hop's index
        index: usize,
        /// number of segments that came back
        len: usize,
    },
}

/// What a hop has to put back into the answer: index and id of the one who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asker(pub u32);

/// Makes `me` the current segment of `conn` (the table of section 4.2), and tells who asked.
///
/// # Errors
/// A path that contradicts itself or the connection's id.
pub fn step(conn: &mut Connection, me: &str, mut new_id: impl FnMut() -> String) -> Result<Asker, PathError> {
    let path = conn.path.get_or_insert_with(Path::default);
    let segments = &mut path.path_segments;
    if segments.len() > MAX_SEGMENTS {
        return Err(PathError::TooLong(segments.len()));
    }
    if segments.is_empty() {
        if conn.id.is_empty() {
            conn.id = new_id();
        }
        path.index = 0;
        segments.push(PathSegment { name: me.into(), id: conn.id.clone(), ..PathSegment::default() });
        return Ok(Asker(0));
    }
    let index = path.index as usize;
    if let Some(own) = segments.get(index)
        && own.name == me
    {
        conn.id.clone_from(&own.id);
        return Ok(Asker(path.index));
    }
    let Some(sender) = segments.get(index) else {
        return Err(PathError::IndexPastEnd { next: u64::from(path.index) + 1, len: segments.len() });
    };
    if sender.id != conn.id {
        return Err(PathError::ForeignId { segment: sender.id.clone(), connection: conn.id.clone() });
    }
    let len = segments.len();
    match segments.get_mut(index + 1) {
        Some(next) if next.name == me => {}
        Some(next) => {
            next.name = me.into();
            next.id = new_id();
        }
        None if len >= MAX_SEGMENTS => return Err(PathError::TooLong(len + 1)),
        None => segments.push(PathSegment { name: me.into(), id: new_id(), ..PathSegment::default() }),
    }
    conn.id.clone_from(&segments[index + 1].id);
    path.index += 1;
    Ok(Asker(index as u32))
}

/// Gives an answer the asker's index and id back.
///
/// # Errors
/// [`PathError::Cut`] if the asker's segment is not in the answer.
pub fn restore(conn: &mut Connection, asker: Asker) -> Result<(), PathError> {
    let path = conn.path.get_or_insert_with(Path::default);
    let index = asker.0 as usize;
    let Some(segment) = path.path_segments.get(index) else {
        return Err(PathError::Cut { index, len: path.path_segments.len() });
    };
    conn.id.clone_from(&segment.id);
    path.index = asker.0;
    Ok(())
}

/// Gives an answer back what its asker knows better than the one who answered: everything left of the asker's segment,
/// the segment's name and id, and the place in the path. A neighbour has no say in which connection it answers for.
///
/// # Errors
/// [`PathError::Cut`] if the asker's segment is not in the answer.
pub fn graft(answer: &mut Connection, asked: &Connection) -> Result<(), PathError> {
    let index = index(asked);
    let Some(own) = segments(asked).get(index) else {
        return Err(PathError::Cut { index, len: segments(asked).len() });
    };
    let path = answer.path.get_or_insert_with(Path::default);
    if path.path_segments.len() <= index {
        return Err(PathError::Cut { index, len: path.path_segments.len() });
    }
    path.path_segments[..index].clone_from_slice(&segments(asked)[..index]);
    path.path_segments[index].name.clone_from(&own.name);
    path.path_segments[index].id.clone_from(&own.id);
    path.index = index as u32;
    answer.id.clone_from(&own.id);
    Ok(())
}

/// Makes the current segment one of a new connection: it gets this id, and what stands right of it, which names
/// somebody else's state, is cut.
pub fn begin_anew(conn: &mut Connection, id: String) {
    trim(conn);
    if let Some(own) = current_mut(conn) {
        own.id.clone_from(&id);
        own.metrics.clear();
    }
    conn.id = id;
}

/// Whether the path goes on behind the current segment: then the connection stood already, at this process or at the one
/// before it, and is asked for as it is.
#[must_use]
pub fn goes_on(conn: &Connection) -> bool {
    conn.state() != State::ReselectRequested && segments(conn).len() > index(conn) + 1
}

/// Cuts what stands right of the current segment: stale hops of an earlier, longer path (section 4.3).
pub fn trim(conn: &mut Connection) {
    if let Some(path) = &mut conn.path {
        path.path_segments.truncate(path.index as usize + 1);
    }
}

/// Gives a connection the hops behind the current one as `known`, the same connection at this hop, has them: whoever asks
/// may not have heard our last answer, and a hop would take it for another connection, beside the one that it has.
pub fn go_on_as(conn: &mut Connection, known: &Connection) {
    let behind = index(conn) + 1;
    let Some(next) = segments(known).get(behind) else { return };
    let is_known = |there: &PathSegment| (&there.name, &there.id) == (&next.name, &next.id);
    if segments(conn).get(behind).is_some_and(is_known) {
        return;
    }
    if let Some(path) = &mut conn.path {
        path.path_segments.truncate(behind);
        path.path_segments.extend_from_slice(&segments(known)[behind..]);
    }
}

/// The current segment.
#[must_use]
pub fn current(conn: &Connection) -> Option<&PathSegment> {
    let path = conn.path.as_ref()?;
    path.path_segments.get(path.index as usize)
}

/// The current segment, to be filled.
pub fn current_mut(conn: &mut Connection) -> Option<&mut PathSegment> {
    let path = conn.path.as_mut()?;
    path.path_segments.get_mut(path.index as usize)
}

/// The segment left of the current one: who sent this request.
pub fn previous_mut(conn: &mut Connection) -> Option<&mut PathSegment> {
    let path = conn.path.as_mut()?;
    path.path_segments.get_mut((path.index as usize).checked_sub(1)?)
}

/// All segments, in order; empty without a path.
#[must_use]
pub fn segments(conn: &Connection) -> &[PathSegment] {
    conn.path.as_ref().map_or(&[], |path| &path.path_segments)
}

/// The index of the current segment.
#[must_use]
pub fn index(conn: &Connection) -> usize {
    conn.path.as_ref().map_or(0, |path| path.index as usize)
}

/// The id by which the client knows this connection: the first segment's. It names interfaces' aliases
/// (spec/data-plane.md 2.5).
#[must_use]
pub fn client_id(conn: &Connection) -> &str {
    segments(conn).first().map_or(&conn.id, |first| &first.id)
}

/// The earliest expiry on the path; a segment without one counts as expired long ago, as upstream has it.
#[must_use]
pub fn earliest_expiry(conn: &Connection) -> Option<SystemTime> {
    segments(conn).iter().map(|segment| segment.expires.as_ref().map_or(UNIX_EPOCH, from_timestamp)).min()
}

/// When the first token of the hops before the current one expires; without any `expires` there: `None`.
///
/// From then on nobody can use this path any more, whatever the later tokens say: every server refuses an expired
/// token anywhere on its left (section 13.2). So that is how long a connection lives at this hop.
#[must_use]
pub fn expiry_before_us(conn: &Connection) -> Option<SystemTime> {
    let before = segments(conn).iter().take(index(conn));
    before.filter_map(|segment| segment.expires.as_ref()).map(from_timestamp).min()
}

/// All but the token: who has it speaks in its signer's name until it expires, and logs are read by many.
impl fmt::Debug for PathSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, id, token, expires, metrics, signer, chain, unknown } = self;
        f.debug_struct("PathSegment")
            .field("name", name)
            .field("id", id)
            .field("token", &format_args!("<{} bytes>", token.len()))
            .field("expires", expires)
            .field("metrics", metrics)
            .field("signer", &format_args!("<{} bytes>", signer.len()))
            .field("chain", &format_args!("<{} certificates>", chain.len()))
            .field("unknown", unknown)
            .finish()
    }
}

/// Wall-clock time of the wire; out of range is cut to what the platform can hold.
#[must_use]
pub fn from_timestamp(t: &Timestamp) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(u32::try_from(t.nanos).unwrap_or(0).min(999_999_999)));
    let secs = Duration::from_secs(t.seconds.unsigned_abs());
    let base = if t.seconds >= 0 { UNIX_EPOCH.checked_add(secs) } else { UNIX_EPOCH.checked_sub(secs) };
    base.and_then(|b| b.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// The wire's form of a wall-clock time after 1970.
#[must_use]
pub fn to_timestamp(t: SystemTime) -> Timestamp {
    let since = t.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos() as i32, // below 1e9, fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_lives_as_long_as_every_token_before_it() {
        let at = |secs| Some(Timestamp { seconds: secs, nanos: 0 });
        let segment = |expires| PathSegment { expires, ..PathSegment::default() };
        let path_segments = vec![segment(at(30)), segment(None), segment(at(60)), segment(at(10))];
        let conn = |index| Connection {
            path: Some(Path { unknown: None, index, path_segments: path_segments.clone() }),
            ..Connection::default()
        };
        let expiry = |index| expiry_before_us(&conn(index)).map(|at| to_timestamp(at).seconds);
        assert_eq!([expiry(0), expiry(1), expiry(3), expiry(4)], [None, Some(30), Some(30), Some(10)]);
    }

    fn ids() -> impl FnMut() -> String {
        let mut n = 0;
        move || {
            n += 1;
            format!("u{n}")
        }
    }

    fn names(conn: &Connection) -> Vec<(&str, &str)> {
        segments(conn).iter().map(|s| (s.name.as_str(), s.id.as_str())).collect()
    }

    #[test]
    fn first_hop_starts_the_path_with_its_own_id() {
        let mut conn = Connection { id: "nsc-0".into(), ..Connection::default() };
        assert_eq!(step(&mut conn, "nsc", ids()), Ok(Asker(0)));
        assert_eq!(names(&conn), [("nsc", "nsc-0")]);
        let mut anonymous = Connection::default();
        step(&mut anonymous, "nsc", ids()).unwrap();
        assert_eq!(anonymous.id, "u1");
    }

    #[test]
    fn a_refresh_keeps_all_ids_and_a_new_hop_gets_a_new_one() {
        let mut next = ids();
        let mut conn = Connection { id: "nsc-0".into(), ..Connection::default() };
        step(&mut conn, "nsc", &mut next).unwrap();
        let client = step(&mut conn, "mgr", &mut next).unwrap();
        let manager = step(&mut conn, "fwd", &mut next).unwrap();
        assert_eq!((conn.id.as_str(), index(&conn)), ("u2", 2));
        restore(&mut conn, manager).unwrap();
        restore(&mut conn, client).unwrap();
        assert_eq!((conn.id.as_str(), index(&conn)), ("nsc-0", 0));

        step(&mut conn, "nsc", &mut next).unwrap();
        step(&mut conn, "mgr", &mut next).unwrap();
        step(&mut conn, "fwd-2", &mut next).unwrap();
        assert_eq!(names(&conn), [("nsc", "nsc-0"), ("mgr", "u1"), ("fwd-2", "u3")]);
    }

    #[test]
    fn the_same_hop_twice_is_a_no_op() {
        let mut conn = Connection { id: "a".into(), ..Connection::default() };
        step(&mut conn, "mgr", ids()).unwrap();
        assert_eq!(step(&mut conn, "mgr", ids()), Ok(Asker(0)));
        assert_eq!(names(&conn).len(), 1);
    }

    #[test]
    fn a_path_that_lies_is_refused() {
        let mut conn = Connection { id: "x".into(), ..Connection::default() };
        step(&mut conn, "nsc", ids()).unwrap();
        let mut past = conn.clone();
        past.path.as_mut().unwrap().index = u32::MAX;
        assert_eq!(
            step(&mut past, "mgr", ids()),
            Err(PathError::IndexPastEnd { next: u64::from(u32::MAX) + 1, len: 1 })
        );
        let mut foreign = conn.clone();
        foreign.id = "y".into();
        assert!(matches!(step(&mut foreign, "mgr", ids()), Err(PathError::ForeignId { .. })));
        let mut cut = Connection::default();
        assert_eq!(restore(&mut cut, Asker(0)), Err(PathError::Cut { index: 0, len: 0 }));
        let mut long = conn;
        long.path.as_mut().unwrap().path_segments = vec![PathSegment::default(); MAX_SEGMENTS + 1];
        assert_eq!(step(&mut long, "mgr", ids()), Err(PathError::TooLong(MAX_SEGMENTS + 1)));
    }

    #[test]
    fn trimming_forgets_stale_hops() {
        let mut conn = Connection { id: "nsc-0".into(), ..Connection::default() };
        let mut next = ids();
        step(&mut conn, "nsc", &mut next).unwrap();
        let client = step(&mut conn, "mgr", &mut next).unwrap();
        step(&mut conn, "fwd", &mut next).unwrap();
        restore(&mut conn, client).unwrap();
        step(&mut conn, "mgr", &mut next).unwrap();
        trim(&mut conn);
        assert_eq!(segments(&conn).len(), 2);
    }

    #[test]
    fn a_neighbour_cannot_answer_for_another_connection() {
        let mut next = ids();
        let mut asked = Connection { id: "nsc-0".into(), ..Connection::default() };
        step(&mut asked, "nsc", &mut next).unwrap();
        step(&mut asked, "mgr", &mut next).unwrap();
        let mut answer = asked.clone();
        step(&mut answer, "fwd", &mut next).unwrap();
        for segment in &mut answer.path.as_mut().unwrap().path_segments[..2] {
            segment.id = "somebody-else".into();
        }
        graft(&mut answer, &asked).unwrap();
        assert_eq!((answer.id.as_str(), index(&answer)), ("u1", 1));
        assert_eq!(names(&answer), [("nsc", "nsc-0"), ("mgr", "u1"), ("fwd", "u2")]);
        assert!(graft(&mut Connection::default(), &asked).is_err());
    }

    #[test]
    fn a_new_connection_knows_nothing_of_the_old_ones_hops() {
        let mut next = ids();
        let mut conn = Connection { id: "nsc-0".into(), ..Connection::default() };
        step(&mut conn, "nsc", &mut next).unwrap();
        let client = step(&mut conn, "mgr", &mut next).unwrap();
        step(&mut conn, "fwd", &mut next).unwrap();
        restore(&mut conn, client).unwrap();
        step(&mut conn, "mgr", &mut next).unwrap();
        begin_anew(&mut conn, "fresh".into());
        assert_eq!((conn.id.as_str(), names(&conn)), ("fresh", vec![("nsc", "nsc-0"), ("mgr", "fresh")]));
    }

    /// Every path of up to four segments with these names, every place in it, with an id that is the sender's and one that
    /// is not.
    fn every_path() -> impl Iterator<Item = Connection> {
        const NAMES: [&str; 3] = ["me", "a", "b"];
        let segment = |at: usize, name: &str| PathSegment {
            name: name.into(),
            id: format!("id-{at}"),
            metrics: [("hop".to_owned(), at.to_string())].into(),
            ..PathSegment::default()
        };
        let paths = (0..=4usize).flat_map(move |len| {
            (0..NAMES.len().pow(len as u32)).map(move |n| {
                let name = |at: usize| NAMES[n / NAMES.len().pow(at as u32) % NAMES.len()];
                (0..len).map(|at| segment(at, name(at))).collect::<Vec<_>>()
            })
        });
        paths.flat_map(|path_segments| {
            (0..=5u32).chain([u32::MAX]).flat_map(move |index| {
                let own = path_segments.get(index as usize).map_or("", |own| &own.id);
                let path = Path { unknown: None, index, path_segments: path_segments.clone() };
                let conn = |id: &str| Connection {
                    id: id.into(),
                    path: Some(path.clone()),
                    ..Connection::default()
                };
                [conn(own), conn("foreign")]
            })
        })
    }

    #[test]
    fn a_step_of_every_path_changes_its_own_segment_at_most() {
        let mut taken = 0;
        for before in every_path() {
            let mut conn = before.clone();
            let (old, at) = (segments(&before), index(&before));
            let stepped = step(&mut conn, "me", || "new".into());
            let new = segments(&conn);
            let Some(sender) = old.get(at) else {
                assert_eq!(stepped.is_ok(), old.is_empty(), "{before:?}");
                continue;
            };
            // Who is there already only says so again; anybody else must be who he claims to be.
            let again = sender.name == "me";
            assert_eq!(stepped.is_ok(), again || sender.id == before.id, "{before:?}");
            let Ok(asker) = stepped else {
                assert_eq!(conn, before, "a refusal changes nothing");
                continue;
            };
            taken += 1;
            let mine = if again { at } else { at + 1 };
            assert_eq!((index(&conn), asker.0 as usize), (mine, at));
            assert_eq!((new[mine].name.as_str(), &new[mine].id), ("me", &conn.id));
            assert_eq!(new.len(), old.len().max(mine + 1));
            let known = old.get(mine).is_some_and(|there| there.name == "me");
            assert_eq!(new[mine].id, if known { old[mine].id.as_str() } else { "new" });
            for (at, kept) in old.iter().enumerate().filter(|(at, _)| *at != mine) {
                assert_eq!(&new[at], kept, "{before:?}");
            }
            // A second step of the same hop changes nothing, and the answer is the asker's.
            let once = conn.clone();
            assert_eq!(step(&mut conn, "me", || "other".into()), Ok(Asker(mine as u32)));
            assert_eq!(conn, once);
            restore(&mut conn, asker).unwrap();
            assert_eq!((index(&conn), &conn.id), (at, &sender.id));
        }
        assert!(taken > 400, "{taken}");
    }

    #[test]
    fn what_is_cut_of_every_path_stands_right_of_the_current_segment() {
        for before in every_path() {
            let (old, at) = (segments(&before), index(&before));
            let kept = old.len().min(at.saturating_add(1));
            let mut conn = before.clone();
            trim(&mut conn);
            assert_eq!((segments(&conn), index(&conn), &conn.id), (&old[..kept], at, &before.id));
            assert!(!goes_on(&conn));
            assert_eq!(goes_on(&before), old.len() > kept);
            let trimmed = conn.clone();
            trim(&mut conn);
            assert_eq!(conn, trimmed);
            begin_anew(&mut conn, "fresh".into());
            let new = segments(&conn);
            assert_eq!((conn.id.as_str(), index(&conn), new.len()), ("fresh", at, kept));
            let left = at.min(old.len());
            assert_eq!(new[..left], old[..left]);
            for own in &new[left..] {
                assert_eq!((own.id.as_str(), &own.name, own.metrics.len()), ("fresh", &old[at].name, 0));
            }
        }
    }

    #[test]
    fn no_answer_says_anything_left_of_its_asker() {
        let asked: Vec<_> = every_path().filter(|conn| conn.id != "foreign").collect();
        let lie = |len: usize| Connection {
            id: "lie".into(),
            path: Some(Path {
                unknown: None,
                index: 3,
                path_segments: vec![
                    PathSegment {
                        name: "liar".into(),
                        id: "lie".into(),
                        ..PathSegment::default()
                    };
                    len
                ],
            }),
            ..Connection::default()
        };
        for (asked, len) in asked.iter().flat_map(|asked| (0..=5).map(move |len| (asked, len))) {
            let (mut answer, at) = (lie(len), index(asked));
            let grafted = graft(&mut answer, asked);
            assert_eq!(grafted.is_ok(), at < segments(asked).len() && at < len);
            if grafted.is_err() {
                assert_eq!(segments(&answer), segments(&lie(len)));
                continue;
            }
            let (new, old) = (segments(&answer), segments(asked));
            assert_eq!((index(&answer), &answer.id, new.len()), (at, &old[at].id, len));
            assert_eq!(new[..at], old[..at]);
            assert_eq!((&new[at].name, &new[at].id), (&old[at].name, &old[at].id));
            assert_eq!(new[at + 1..], segments(&lie(len))[at + 1..]);
        }
    }

    proptest::proptest! {
        #[test]
        fn steps_never_panic_and_answers_come_back_to_the_asker(
            index in 0u32..6, count in 0usize..5, id in "[a-c]{0,1}", name in "[a-c]",
        ) {
            let path_segments = (0..count)
                .map(|i| PathSegment { name: ["a", "b", "c", "a", "b"][i].into(), id: ["a", "b", "c", "a", "b"][i].into(), ..PathSegment::default() })
                .collect();
            let mut conn = Connection { id, path: Some(Path { unknown: None, index, path_segments }), ..Connection::default() };
            let before = conn.clone();
            if let Ok(asker) = step(&mut conn, &name, || "new".into()) {
                assert_eq!(current(&conn).unwrap().name, name);
                assert_eq!(current(&conn).unwrap().id, conn.id);
                restore(&mut conn, asker).unwrap();
                if count > 0 {
                    assert_eq!(conn.path.as_ref().unwrap().index, before.path.unwrap().index);
                }
            }
        }

        #[test]
        fn timestamps_survive(seconds in i64::MIN..i64::MAX, nanos in i32::MIN..i32::MAX) {
            let t = from_timestamp(&Timestamp { seconds, nanos });
            if (0..4_000_000_000).contains(&seconds) && (0..1_000_000_000).contains(&nanos) {
                assert_eq!(to_timestamp(t), Timestamp { seconds, nanos });
            }
        }
    }
}

//! Lists of groups as they stand in the environment: `[a,b],[c],d` (spec/kubernetes.md 1.6 and 3.5.1).

/// One group: its members, and whether it stood in brackets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) bracketed: bool,
    pub(crate) members: Vec<String>,
}

/// Reads a list of groups. Blanks do not count; an empty text is no group.
///
/// # Errors
/// What about it cannot be used.
pub(crate) fn read(text: &str) -> Result<Vec<Group>, String> {
    let compact: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    let (mut groups, mut rest) = (Vec::new(), compact.as_str());
    while !rest.is_empty() {
        let (bracketed, inner, after) = match rest.strip_prefix('[') {
            Some(inner) => {
                let (inner, after) = inner.split_once(']').ok_or("a bracket is not closed")?;
                if inner.contains('[') {
                    return Err(format!("a bracket stands within a group: [{inner}]"));
                }
                (true, inner, after)
            }
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                (false, &rest[..end], &rest[end..])
            }
        };
        groups.push(Group { bracketed, members: inner.split(',').map(str::to_owned).collect() });
        rest = match after.strip_prefix(',') {
            Some("") => return Err("it ends with a comma".into()),
            Some(more) => more,
            None if after.is_empty() => "",
            None => return Err("something other than a comma follows a closing bracket".into()),
        };
    }
    Ok(groups)
}

//! An operator's policies in Rego, with upstream's input and built-ins (spec/control-plane.md 13.1, registry.md 2.9).
//!
//! A policy is a file with a package and a rule `valid`; each file is evaluated alone, and all must be true. Upstream's
//! own seven are plain Rust in [`nsm_identity::policy`], ten times faster; here are those that an operator brings.
//! They see the same document as upstream's, and have `io.jwt.decode` and `io.jwt.verify_es256`, which the interpreter
//! lacks.
//!
//! ```
//! use nsm_identity::policy::Judge;
//! let policy = nsm_rego::Policy::parse("short.rego", "package nsm\nvalid { count(input.path_segments) < 3 }")?;
//! assert_eq!(policy.judge(&serde_json::json!({"path_segments": [{}, {}]})), Ok(true));
//! assert_eq!(policy.judge(&serde_json::json!({"path_segments": [{}, {}, {}]})), Ok(false));
//! # Ok::<(), nsm_rego::Error>(())
//! ```

mod builtins;
mod masks;

use std::{fmt, num::NonZeroU32, path::PathBuf, time::Duration};

pub use masks::{Loaded, Side, load};
use nsm_identity::policy::Judge;
use regorus::{Engine, Value, utils::limits::ExecutionTimerConfig};

/// How long one evaluation may take. Everybody's requests wait for it: a policy that loops is cut off.
const LONGEST: Duration = Duration::from_millis(100);

/// Brackets in brackets, at most: the interpreter's reader tries each in several ways, which doubles its work.
const DEEPEST: usize = 12;

/// Why a policy is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that cannot be read.
    #[error("the policy {path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Not Rego; the reason has the line.
    #[error("the policy {file} is not Rego: {reason}")]
    Syntax {
        /// The file.
        file: String,
        /// What is wrong, and in which line.
        reason: String,
    },
    /// Nothing to evaluate.
    #[error(
        "the policy {file} has no rule `valid` in its package {package}; expected was a rule that is true where the call is allowed"
    )]
    NoRule {
        /// The file.
        file: String,
        /// The package that it has.
        package: String,
    },
    /// A mask that is no regular expression.
    #[error("{mask:?} is neither a file nor a regular expression over file names: {reason}")]
    Mask {
        /// As given.
        mask: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A mask that names nothing. Upstream takes it for "no policy", so that a slip of the pen opens the mesh.
    #[error(
        "{mask:?} names no policy: neither a file, nor files below {directory}, nor any of the built-in ones under etc/nsm/opa"
    )]
    Nothing {
        /// As given.
        mask: String,
        /// Where files were looked for.
        directory: PathBuf,
    },
}

/// One policy, ready to be asked.
pub struct Policy {
    file: String,
    rule: String,
    engine: Engine,
}

impl Policy {
    /// Reads a policy; `file` names it in errors.
    ///
    /// # Errors
    /// It is not Rego, calls what does not exist, or has no rule `valid`.
    pub fn parse(file: &str, text: &str) -> Result<Self, Error> {
        let syntax = |reason: String| Error::Syntax { file: file.into(), reason };
        if depth(text) > DEEPEST {
            return Err(syntax(format!(
                "brackets are nested deeper than {DEEPEST}; expected helper rules instead"
            )));
        }
        let mut engine = Engine::new();
        engine.set_rego_v0(true);
        engine.set_execution_timer_config(ExecutionTimerConfig {
            limit: LONGEST,
            check_interval: NonZeroU32::new(64).unwrap_or(NonZeroU32::MIN),
        });
        builtins::add(&mut engine).map_err(|e| syntax(format!("{e:#}")))?;
        let package = engine.add_policy(file.into(), text.into()).map_err(|e| syntax(format!("{e:#}")))?;
        let has = engine.has_declared_rule_rooted_at(file, "valid").map_err(|e| syntax(format!("{e:#}")))?;
        if !has {
            return Err(Error::NoRule { file: file.into(), package });
        }
        let policy = Self { file: file.into(), rule: format!("{package}.valid"), engine };
        // Compiled now: names that nobody defines are found before the first call, not by it.
        let mut compiled = policy;
        compiled.engine.set_input(Value::new_object());
        compiled.engine.eval_rule(compiled.rule.clone()).map_err(|e| syntax(format!("{e:#}")))?;
        Ok(compiled)
    }
}

impl Judge for Policy {
    fn name(&self) -> &str {
        &self.file
    }

    fn judge(&self, document: &serde_json::Value) -> Result<bool, String> {
        // A clone shares everything compiled.
        let mut engine = self.engine.clone();
        engine.set_input(Value::from(document.clone()));
        match engine.eval_rule(self.rule.clone()) {
            Ok(Value::Bool(verdict)) => Ok(verdict),
            Ok(Value::Undefined) => Ok(false),
            Ok(_) => Err("its rule `valid` is no boolean".into()),
            // What the interpreter says may quote the document, and with it tokens.
            Err(error) => Err(first_line(&format!("{error:#}"))),
        }
    }
}

/// How deep brackets are nested, but for those in texts and comments.
fn depth(text: &str) -> usize {
    let (mut open, mut deepest, mut rest) = (Vec::new(), 0, text.chars());
    while let Some(c) = rest.next() {
        match c {
            '#' => _ = rest.find(|c| *c == '\n'),
            '`' => _ = rest.find(|c| *c == '`'),
            '"' => while rest.next().is_some_and(|c| c != '"' && (c != '\\' || rest.next().is_some())) {},
            '{' => open.push('}'),
            '[' => open.push(']'),
            '(' => open.push(')'),
            _ => _ = open.pop_if(|closes| *closes == c),
        }
        deepest = deepest.max(open.len());
    }
    deepest
}

/// The place and the kind of an error, without what it quotes.
fn first_line(text: &str) -> String {
    let line = text.lines().find(|line| line.contains("error:")).or(text.lines().last()).unwrap_or_default();
    let words = line.split_whitespace().filter(|word| word.len() < 60).collect::<Vec<_>>().join(" ");
    words.chars().take(200).collect()
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy").field("file", &self.file).field("rule", &self.rule).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_whose_brackets_are_nested_without_end_is_refused_at_once() {
        let nested = |times| format!("package nsm\nvalid = {}", "{".repeat(times));
        for text in [nested(31), nested(10_000), format!("package nsm\nvalid = {{\"a\": -{}", "[".repeat(40))]
        {
            let error = Policy::parse("deep.rego", &text).unwrap_err().to_string();
            assert!(error.contains("nested deeper than 12; expected helper rules"), "{error}");
        }
        // Slow as they may be, those that are read end.
        assert!(Policy::parse("deep.rego", &nested(DEEPEST)).is_err());
        let good = "package nsm\n# ((((((((((((((\nvalid { input.x != \"\\\"{{{{{{{{{{{{{{\" ; input.x != `[[[[[[[[[[[[[` }";
        assert_eq!((depth(good), depth("[)](){}"), depth("({[}])")), (1, 1, 3));
        Policy::parse("good.rego", good).unwrap();
    }
}

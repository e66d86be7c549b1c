//! What a webhook is told: what it puts into pods (spec/kubernetes.md 3.10, and a little more).

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde_json::{Value, json};

/// What is wrong with a setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSetting {
    /// No container can have the name that would come out.
    #[error(
        "image {image:?} would make a container named {name:?}, and a container's name has at most 63 lower-case letters, \
         digits and hyphens; write NAME=IMAGE to name it, where IMAGE has a program /bin/NAME"
    )]
    ContainerName {
        /// The image as given.
        image: String,
        /// What it gives.
        name: String,
    },
    /// There is nothing where an image should be.
    #[error("{0:?} names no image; expected [NAME=]IMAGE, for example registry/cmd-nsc:v1.16.0")]
    NoImage(String),
    /// Two containers of a pod cannot have one name.
    #[error(
        "two containers would be named {0:?} (NSM_INIT_CONTAINER_IMAGES, NSM_CONTAINER_IMAGES); write NAME=IMAGE for one"
    )]
    SameName(String),
    /// Not an amount as Kubernetes writes it.
    #[error("{0:?} is no quantity; expected for example 100m, 0.5, 80Mi or 1e3")]
    Quantity(String),
    /// Not a variable with its value.
    #[error("{0:?} is not NAME=VALUE (NSM_ENVS); expected for example NSM_LOG_LEVEL=info")]
    Variable(String),
    /// Not the key of an annotation.
    #[error(
        "{0:?} is no key of an annotation (NSM_ANNOTATION): [PREFIX/]NAME of letters, digits, '-', '_' and '.', that begins \
         and ends with a letter or digit, for example networkservicemesh.io"
    )]
    Annotation(String),
    /// Not where a socket can be.
    #[error(
        "{0:?} is no path of a socket (NSM_IDENTITY_SOCKET); expected for example /run/spire/sockets/agent.sock"
    )]
    Socket(String),
}

/// What pods are given.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Key of the annotation that asks for wires.
    pub annotation: Annotation,
    /// Labels of patched pods.
    pub labels: BTreeMap<String, String>,
    /// The variable that carries the annotation's value.
    pub nsurl_env: String,
    /// What runs before the pod's own containers.
    pub init_images: Vec<Program>,
    /// What runs beside them.
    pub images: Vec<Program>,
    /// Further variables of both.
    pub envs: Vec<Variable>,
    /// What each of our containers may take.
    pub resources: Resources,
    /// The cluster has side-cars of its own kind: init containers that stay.
    pub native_sidecars: bool,
    /// A value that cannot be understood keeps its pod out, instead of a warning and a pod that does not start.
    pub reject_malformed: bool,
    /// Where nodes have the socket of the SPIFFE Workload API.
    pub identity_socket: SocketPath,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            annotation: Annotation::default(),
            labels: BTreeMap::new(),
            nsurl_env: "NSM_NETWORK_SERVICES".into(),
            init_images: Vec::new(),
            images: Vec::new(),
            envs: Vec::new(),
            resources: Resources::default(),
            native_sidecars: false,
            reject_malformed: false,
            identity_socket: SocketPath::default(),
        }
    }
}

impl Settings {
    /// What only shows when all of it is known.
    ///
    /// # Errors
    /// Two containers would have one name.
    pub fn check(&self) -> Result<(), BadSetting> {
        let mut names: Vec<_> = self.names().collect();
        names.sort_unstable();
        let twice = names.windows(2).find(|pair| pair[0] == pair[1]);
        twice.map_or(Ok(()), |pair| Err(BadSetting::SameName(pair[0].to_owned())))
    }

    /// The names of our containers.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.init_images.iter().chain(&self.images).map(|program| program.name.as_str())
    }
}

/// A key of annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotation(String);

impl Default for Annotation {
    fn default() -> Self {
        Self("networkservicemesh.io".into())
    }
}

/// A socket on nodes: its directory is mounted into pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketPath {
    /// The directory.
    pub directory: String,
    /// The name in it.
    pub file: String,
}

impl Default for SocketPath {
    fn default() -> Self {
        Self { directory: "/run/spire/sockets".into(), file: "agent.sock".into() }
    }
}

impl FromStr for SocketPath {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        match text.rsplit_once('/') {
            Some((directory, file))
                if directory.starts_with('/') && directory[1..].split('/').chain([file]).all(plain) =>
            {
                Ok(Self { directory: directory.into(), file: file.into() })
            }
            _ => Err(BadSetting::Socket(text.to_owned())),
        }
    }
}

impl Annotation {
    /// The key.
    pub fn key(&self) -> &str {
        &self.0
    }

    /// The key that says more of it: one of our own, so that no other programs' keys are taken.
    #[must_use]
    pub fn beside(&self, word: &str) -> String {
        let separator = if self.0.contains('/') { '-' } else { '/' };
        format!("{}{separator}{word}", self.0)
    }
}

impl fmt::Display for Annotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Annotation {
    type Err = BadSetting;

    /// As the API server checks keys of annotations.
    fn from_str(text: &str) -> Result<Self, BadSetting> {
        let word = |text: &str, most: usize| {
            let end = |c: char| c.is_ascii_alphanumeric();
            text.len() <= most
                && text.starts_with(end)
                && text.ends_with(end)
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let good = match text.split_once('/') {
            Some((prefix, name)) => word(prefix, 253) && word(name, 63),
            None => word(text, 63),
        };
        good.then(|| Self(text.into())).ok_or_else(|| BadSetting::Annotation(text.into()))
    }
}

/// A container of ours: an image, and which of its programs runs where it has several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The container's name.
    pub name: String,
    /// The image.
    pub image: String,
    /// What to run; without it what the image says.
    pub command: Option<String>,
}

impl FromStr for Program {
    type Err = BadSetting;

    /// `IMAGE`, whose base name becomes the container's as upstream has it, or `NAME=IMAGE`, which runs `/bin/NAME`.
    fn from_str(text: &str) -> Result<Self, BadSetting> {
        let (named, image) = match text.split_once('=') {
            Some((name, image)) => (Some(name), image),
            None => (None, text),
        };
        if image.is_empty() {
            return Err(BadSetting::NoImage(text.into()));
        }
        let base = image.rsplit('/').next().unwrap_or_default();
        let name = named.unwrap_or_else(|| base.split([':', '@']).next().unwrap_or_default());
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let good = name.starts_with(inner)
            && name.ends_with(inner)
            && name.len() <= 63
            && name.chars().all(|c| inner(c) || c == '-');
        if !good {
            return Err(BadSetting::ContainerName { image: image.into(), name: name.into() });
        }
        let command = named.map(|name| format!("/bin/{name}"));
        Ok(Self { name: name.into(), image: image.into(), command })
    }
}

/// A variable of our containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

impl FromStr for Variable {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok(Self { name: name.into(), value: value.into() }),
            _ => Err(BadSetting::Variable(text.into())),
        }
    }
}

/// What one container may take, and what it is given at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// At most so much of a processor.
    pub limits_cpu: Quantity,
    /// At most so much memory.
    pub limits_memory: Quantity,
    /// At least so much of a processor.
    pub requests_cpu: Quantity,
    /// At least so much memory.
    pub requests_memory: Quantity,
}

impl Default for Resources {
    fn default() -> Self {
        let quantity = |text: &str| Quantity(text.into());
        Self {
            limits_cpu: quantity("200m"),
            limits_memory: quantity("80Mi"),
            requests_cpu: quantity("100m"),
            requests_memory: quantity("40Mi"),
        }
    }
}

impl Resources {
    /// As a container has them, with so many devices of each kind.
    pub(crate) fn with(&self, devices: &BTreeMap<String, u32>) -> Value {
        let mut limits = json!({ "cpu": self.limits_cpu.0, "memory": self.limits_memory.0 });
        for (device, count) in devices {
            limits[device] = json!(count.to_string());
        }
        json!({ "limits": limits, "requests": { "cpu": self.requests_cpu.0, "memory": self.requests_memory.0 } })
    }
}

/// An amount as Kubernetes writes it: `100m`, `80Mi`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantity(String);

impl FromStr for Quantity {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let number = number.chars().any(|c| c.is_ascii_digit()) && number.matches('.').count() <= 1;
        let exponent = suffix.strip_prefix(['e', 'E']).is_some_and(|rest| {
            let digits = rest.strip_prefix(['+', '-']).unwrap_or(rest);
            !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit())
        });
        let units = ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        match number && (exponent || units.contains(&suffix)) {
            true => Ok(Self(text.into())),
            false => Err(BadSetting::Quantity(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_named_by_their_images_or_by_whoever_sets_them() {
        let name = |text: &str| text.parse::<Program>().map(|program| (program.name, program.command));
        for image in [
            "cmd-nsc",
            "cmd-nsc:v1",
            "ghcr.io/networkservicemesh/ci/cmd-nsc:d0b1a2c",
            "registry:5000/a/cmd-nsc",
            "registry/cmd-nsc@sha256:0123",
        ] {
            assert_eq!(name(image), Ok(("cmd-nsc".into(), None)), "{image}");
        }
        let ours = "cmd-nsc=nsm:dev".parse::<Program>().unwrap();
        assert_eq!((ours.image.as_str(), ours.command.as_deref()), ("nsm:dev", Some("/bin/cmd-nsc")));
        for (bad, says) in [
            ("", "\"\" names no image; expected [NAME=]IMAGE"),
            ("cmd-nsc=", "\"cmd-nsc=\" names no image"),
            ("registry/", "would make a container named \"\""),
            ("registry/cmd_nsc:1", "would make a container named \"cmd_nsc\""),
            ("Cmd=nsm:dev", "image \"nsm:dev\" would make a container named \"Cmd\""),
            ("-a=nsm:dev", "container named \"-a\""),
            (&format!("{}=nsm", "a".repeat(64)), "at most 63 lower-case"),
        ] {
            let error = bad.parse::<Program>().expect_err(bad).to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    #[test]
    fn two_containers_of_one_name_are_refused() {
        let images = |init: &str, side: &str| {
            let settings = Settings {
                init_images: vec![init.parse().unwrap()],
                images: vec![side.parse().unwrap()],
                ..Settings::default()
            };
            settings.check()
        };
        assert_eq!(images("nsm:dev", "nsm:dev"), Err(BadSetting::SameName("nsm".into())));
        assert_eq!(images("cmd-nsc-init=nsm:dev", "cmd-nsc=nsm:dev"), Ok(()));
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for good in ["1", "100m", "0.5", ".5", "5.", "80Mi", "1e3", "1E-3", "-1", "+2Gi", "3E", "4k"] {
            assert!(good.parse::<Quantity>().is_ok(), "{good}");
        }
        for bad in ["", "m", ".", "1.2.3", "1 Mi", "80MB", "1e", "1ee3", "ten", "1K", "--1"] {
            let error = bad.parse::<Quantity>().expect_err(bad).to_string();
            assert!(error.contains("is no quantity; expected for example 100m"), "{error}");
        }
    }

    #[test]
    fn a_variable_keeps_everything_behind_its_first_equals_sign() {
        let variable = "A=b=c".parse::<Variable>().unwrap();
        assert_eq!((variable.name.as_str(), variable.value.as_str()), ("A", "b=c"));
        for bad in ["A", "", "=b"] {
            let error = bad.parse::<Variable>().expect_err(bad).to_string();
            assert!(error.contains("is not NAME=VALUE (NSM_ENVS)"), "{error}");
        }
    }

    #[test]
    fn sockets_are_files_in_directories() {
        let path = "/run/spire/sockets/agent.sock".parse::<SocketPath>().unwrap();
        assert_eq!(path, SocketPath::default());
        for bad in [
            "",
            "agent.sock",
            "/agent.sock",
            "run/agent.sock",
            "/run//agent.sock",
            "/run/../agent.sock",
            "/run/",
        ] {
            let error = bad.parse::<SocketPath>().expect_err(bad).to_string();
            assert!(error.contains("expected for example /run/spire/sockets/agent.sock"), "{error}");
        }
    }

    #[test]
    fn keys_of_annotations_are_those_of_kubernetes() {
        for (good, beside) in [
            ("networkservicemesh.io", "networkservicemesh.io/inject"),
            ("ns.example/wires", "ns.example/wires-inject"),
        ] {
            assert_eq!(good.parse::<Annotation>().unwrap().beside("inject"), beside);
        }
        for bad in ["", "/", "a/", "/a", "a/b/c", "-a", "a b", "a'b", &"a".repeat(64)] {
            let error = bad.parse::<Annotation>().expect_err(bad).to_string();
            assert!(error.contains("is no key of an annotation (NSM_ANNOTATION)"), "{error}");
        }
    }
}

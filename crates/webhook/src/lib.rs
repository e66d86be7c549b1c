//! The admission webhook: whoever annotates a pod, a workload or a namespace with `networkservicemesh.io` gets what makes
//! the wires put into the pod (spec/kubernetes.md section 2).
//!
//! What to do is decided by values alone: [`review::decode`] reads what the API server sends, [`inject::subject`] says
//! whether it concerns us, [`inject::Subject::plan`] says what is to change, and [`review::answer`] tells it.
//!
//! ```
//! use nsm_webhook::{inject::{Namespace, subject}, review, settings::Settings};
//!
//! let settings = Settings { images: vec!["registry/cmd-nsc:v1".parse()?], ..Settings::default() };
//! let request = review::decode(br#"{
//!     "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
//!     "request": {
//!         "uid": "7", "operation": "CREATE", "kind": {"group": "", "version": "v1", "kind": "Pod"},
//!         "object": {
//!             "metadata": {"name": "web", "annotations": {"networkservicemesh.io": "kernel://finance/nsm-1"}},
//!             "spec": {"containers": [{"name": "web", "image": "web"}]}
//!         }
//!     }
//! }"#)?;
//! let plan = subject(&settings, &request)?.plan(&settings, &Namespace::default(), "a-random-id");
//! assert_eq!(plan.to_string(), "patched: initContainers 0 +0, containers 1 +1, volumes 0 +2, labels 0 +0");
//! assert_eq!(review::answer(&request, &plan)["response"]["allowed"], true);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

pub mod annotation;
pub mod cluster;
pub mod configuration;
pub mod inject;
pub mod keeper;
pub mod review;
pub mod server;
pub mod settings;

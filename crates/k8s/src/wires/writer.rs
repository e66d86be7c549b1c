//! Says it: one call after the other, with pauses, and ever longer ones while the API server is away.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use nsm_identity::clock;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{debug, info, warn};

use super::{
    Wires,
    object::{CONDITION, NODE, condition, stamp},
    table::{Gate, Job, Next, Said, State},
};
use crate::objects::{ApiError, Objects, Patch, escaped};

/// Calls in a second when there is much to say, and how many may be made at once.
const RATE: (f64, f64) = (20.0, 60.0);
/// Pauses while the API server is away.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long after its start the mesh may take until a wire that stood before is one again: endpoints register anew.
const RETURNS: Duration = Duration::from_secs(15);
/// When what was refused is tried again: somebody may have given us the right, or the resource.
const REFUSED: Duration = Duration::from_secs(60);

/// The only one who says what becomes of the wires of its node's pods.
#[derive(Debug)]
pub struct Writer {
    api: Objects,
    wires: Wires,
    node: String,
    /// After that, what an earlier process said and nobody claims is taken back.
    claim: Duration,
    begun: Instant,
    calls: f64,
    refilled: Instant,
    refused: BTreeSet<String>,
}

/// Why a job is not done.
enum Stopped {
    /// The API server is away, or has too much to do.
    Away(ApiError),
    /// The pod, or what it is in, is not there any more.
    Gone,
}

impl Writer {
    /// For the pods of a node. `claim` is how long a wire may be there that nobody asks for.
    #[must_use]
    pub fn new(api: Objects, wires: Wires, node: impl Into<String>, claim: Duration) -> Self {
        Self {
            api,
            wires,
            node: node.into(),
            claim,
            begun: Instant::now(),
            calls: RATE.1,
            refilled: Instant::now(),
            refused: BTreeSet::new(),
        }
    }

    /// Says what there is to say; does not end.
    pub async fn run(mut self) {
        let (mut pause, mut away) = (PAUSES.0, false);
        let claimed = Instant::now() + self.claim;
        let mut orphans: Option<BTreeMap<String, String>> = None;
        loop {
            if orphans.is_none() && !away {
                orphans = self.orphans().await;
            }
            let next = self.wires.0.table.lock().next(Instant::now());
            let until = match next {
                Next::Job(job) => {
                    self.do_job(job, &mut orphans, &mut pause, &mut away).await;
                    continue;
                }
                Next::At(until) => Some(until),
                Next::Nothing => None,
            };
            // What is claimed is said by now.
            let left = orphans.as_mut().filter(|left| !left.is_empty());
            let until = match left {
                Some(left) if Instant::now() >= claimed => {
                    self.take_back(left).await;
                    continue;
                }
                Some(_) => Some(until.map_or(claimed, |until| until.min(claimed))),
                None => until,
            };
            let news = self.wires.0.news.notified();
            match until {
                Some(until) => {
                    let _ = timeout_at(until, news).await;
                }
                None => news.await,
            }
        }
    }

    async fn do_job(
        &mut self,
        mut job: Box<Job>,
        orphans: &mut Option<BTreeMap<String, String>>,
        pause: &mut Duration,
        away: &mut bool,
    ) {
        let stood = orphans.as_ref().is_some_and(|left| left.contains_key(&job.seen.object_name()));
        let returned = self.begun + RETURNS;
        if stood && job.seen.state != State::Up && Instant::now() < returned {
            self.wires.0.table.lock().put_off(&job, returned);
            return;
        }
        let refused = match self.say(&mut job).await {
            Ok(refused) => refused,
            Err(Stopped::Gone) => false,
            Err(Stopped::Away(error)) => {
                if !*away {
                    warn!(%error, "nothing can be said of wires on pods; trying on");
                }
                *away = true;
                self.wires.0.table.lock().done(&job, Some(Instant::now()), Instant::now());
                sleep(*pause).await;
                *pause = (*pause * 2).min(PAUSES.1);
                return;
            }
        };
        if std::mem::take(away) {
            info!("what became of wires is said on pods again");
        }
        *pause = PAUSES.0;
        if let Some(orphans) = orphans {
            orphans.remove(&job.seen.object_name());
        }
        let now = Instant::now();
        self.wires.0.table.lock().done(&job, refused.then_some(now + REFUSED), now);
    }

    /// Says how one wire is; answers with whether something was refused.
    async fn say(&mut self, job: &mut Job) -> Result<bool, Stopped> {
        // Somebody waits for this one.
        let mut refused = self.gate(job).await?;
        refused |= self.object(job).await?;
        refused |= self.event(job).await?;
        Ok(refused)
    }

    /// `None`: it was refused, which is said once.
    fn judged<T>(&mut self, result: Result<T, ApiError>) -> Result<Option<T>, Stopped> {
        let error = match result {
            Ok(done) => return Ok(Some(done)),
            Err(error) => error,
        };
        match error.code() {
            None | Some(429 | 500..) => Err(Stopped::Away(error)),
            _ if error.is_about_the_end() => {
                debug!(%error, "nothing is said any more of a wire whose pod is gone");
                Err(Stopped::Gone)
            }
            _ => {
                let said = error.refusal();
                if self.refused.len() < 64 && self.refused.insert(said.clone()) {
                    warn!(%error, "nothing is said of wires as long as that is so");
                }
                debug!(%error, "refused");
                Ok(None)
            }
        }
    }

    /// Tells a pod that waits for its wires whether they are there.
    async fn gate(&mut self, job: &mut Job) -> Result<bool, Stopped> {
        let name = &job.seen.name;
        let (what, path) = (
            format!("the status of the pod {}/{}", name.namespace, name.pod),
            format!("/api/v1/namespaces/{}/pods/{}/status", escaped(&name.namespace), escaped(&name.pod)),
        );
        if job.gate == Gate::Unknown {
            // Nothing is changed: the answer is the pod, which we may not read otherwise, because all pods could be then.
            let nothing = json!({ "metadata": { "uid": job.seen.uid } });
            self.turn().await;
            let pod = self.api.patch(&what, &path, Patch::Strategic, &nothing).await;
            let Some(pod) = self.judged(pod)? else { return Ok(true) };
            let gates = pod["spec"]["readinessGates"].as_array();
            let waits = gates.is_some_and(|all| all.iter().any(|gate| gate["conditionType"] == CONDITION));
            job.gate = if waits { Gate::Waits(None) } else { Gate::Open };
        }
        match &job.gate {
            Gate::Waits(said) if said.as_ref() != Some(&job.missing) => {
                let change = condition(&job.seen.uid, job.missing.as_deref(), clock::now());
                self.turn().await;
                let done = self.api.patch(&what, &path, Patch::Strategic, &change).await;
                if self.judged(done)?.is_none() {
                    return Ok(true);
                }
                job.gate = Gate::Waits(Some(job.missing.clone()));
            }
            _ => {}
        }
        Ok(false)
    }

    /// Keeps the resource of a wire.
    async fn object(&mut self, job: &mut Job) -> Result<bool, Stopped> {
        let namespace = escaped(&job.seen.name.namespace);
        let collection = format!("/apis/networkservicemesh.io/v1/namespaces/{namespace}/wires");
        let path = format!("{collection}/{}", escaped(&job.seen.object_name()));
        if job.seen.state == State::Ended {
            if job.told.object.is_none() {
                return Ok(false);
            }
            self.turn().await;
            let done = self.api.delete("a wire", &path).await;
            return Ok(self.judged(done)?.is_none());
        }
        if job.told.object.is_none() {
            let object = job.seen.object(&self.node);
            self.turn().await;
            let made = match self.api.create("a wire", &collection, &object).await {
                Err(error) if error.is_conflict() => {
                    // Said by the process before us: what it said need not be said again.
                    self.turn().await;
                    let found = self.api.get("a wire", &path).await;
                    let Some(found) = self.judged(found)? else { return Ok(true) };
                    job.told.said = said_before(&found["status"]);
                    let state = job.told.said.as_ref().map(|said| said.state);
                    job.was_up |= matches!(state, Some(State::Up | State::Down));
                    if job.was_up && job.seen.state == State::NotUp {
                        job.seen.state = State::Down;
                    }
                    Ok(found)
                }
                made => made,
            };
            let Some(made) = self.judged(made)? else { return Ok(true) };
            job.told.object = Some(made["status"].clone());
        }
        let status = job.seen.status();
        if job.told.object.as_ref().is_some_and(|told| differs(told, &status)) {
            self.turn().await;
            let change = json!({ "status": status });
            let path = format!("{path}/status");
            match self.api.patch("the status of a wire", &path, Patch::Merge, &change).await {
                // Somebody removed it; it is made again next time.
                Err(error) if error.code() == Some(404) && !error.is_about_the_end() => {
                    job.told.object = None;
                    return Ok(true);
                }
                done => {
                    if self.judged(done)?.is_none() {
                        return Ok(true);
                    }
                }
            }
            job.told.object = job.told.object.take().map(|told| merged(told, status));
        }
        Ok(false)
    }

    /// Says on the pod what happened, if something did.
    async fn event(&mut self, job: &mut Job) -> Result<bool, Stopped> {
        let seen = &job.seen;
        let collection = format!("/api/v1/namespaces/{}/events", escaped(&seen.name.namespace));
        let now = clock::now();
        let state = Said {
            state: seen.state,
            endpoint: seen.shape.as_ref().map(|shape| shape.endpoint.clone()).unwrap_or_default(),
            trouble: seen.trouble_text().to_owned(),
            event: None,
            at: Instant::now(),
        };
        let Some(news) = seen.news(job.told.said.as_ref()) else {
            return match job.told.said.clone().filter(|said| said.is_old(Instant::now())) {
                Some(said) => self.again(job, said, &collection, now).await,
                None => Ok(false),
            };
        };
        let nanos = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = format!("{}.{nanos:x}", seen.object_name());
        let event = news.event(seen, &self.node, &name, now);
        info!(
            pod = %format_args!("{}/{}", seen.name.namespace, seen.name.pod),
            reason = news.reason, message = news.message, "said on the pod"
        );
        self.turn().await;
        let made = self.api.create("an event", &collection, &event).await;
        if self.judged(made)?.is_none() {
            return Ok(true);
        }
        job.told.said = Some(Said { event: Some((name, 1)), ..state });
        Ok(false)
    }

    /// It is as it was: the same event counts one more.
    async fn again(
        &mut self,
        job: &mut Job,
        said: Said,
        collection: &str,
        now: SystemTime,
    ) -> Result<bool, Stopped> {
        let Some((name, count)) = said.event.clone() else {
            // Not by us; from now on.
            job.told.said = None;
            return Box::pin(self.event(job)).await;
        };
        let path = format!("{collection}/{}", escaped(&name));
        self.turn().await;
        let change = json!({ "count": count + 1, "lastTimestamp": stamp(now) });
        match self.api.patch("an event", &path, Patch::Merge, &change).await {
            Err(error) if error.code() == Some(404) => {
                job.told.said = None;
                return Box::pin(self.event(job)).await;
            }
            done => {
                if self.judged(done)?.is_none() {
                    return Ok(true);
                }
            }
        }
        job.told.said = Some(Said { event: Some((name, count + 1)), at: Instant::now(), ..said });
        Ok(false)
    }

    /// What an earlier process of this node said: names and namespaces.
    async fn orphans(&mut self) -> Option<BTreeMap<String, String>> {
        let selector = escaped(&format!("{NODE}={}", self.node));
        let path = format!("/apis/networkservicemesh.io/v1/wires?labelSelector={selector}");
        self.turn().await;
        let listed = self.api.metadata("wires", &path).await;
        let found = match self.judged(listed) {
            Ok(found) => found.unwrap_or_default(),
            Err(_) => return None,
        };
        let text = |wire: &Value, key: &str| wire["metadata"][key].as_str().unwrap_or_default().to_owned();
        Some(found.iter().map(|wire| (text(wire, "name"), text(wire, "namespace"))).collect())
    }

    async fn take_back(&mut self, orphans: &mut BTreeMap<String, String>) {
        while let Some((name, namespace)) = orphans.pop_first() {
            self.turn().await;
            let path = format!(
                "/apis/networkservicemesh.io/v1/namespaces/{}/wires/{}",
                escaped(&namespace),
                escaped(&name)
            );
            match self.api.delete("a wire", &path).await {
                Ok(()) => info!(wire = name, namespace, "nobody asks for it any more: taken back"),
                Err(error) => debug!(%error, "a wire that nobody asks for stays; it goes with its pod"),
            }
        }
    }

    /// Waits until one more call may be made.
    async fn turn(&mut self) {
        let (rate, most) = RATE;
        let now = Instant::now();
        self.calls = (self.calls + (now - self.refilled).as_secs_f64() * rate).min(most);
        self.refilled = now;
        if self.calls < 1.0 {
            let wait = Duration::from_secs_f64((1.0 - self.calls) / rate);
            sleep_until(now + wait).await;
            self.calls = 1.0;
            self.refilled = now + wait;
        }
        self.calls -= 1.0;
    }
}

/// What a status tells that its writer has said on the pod.
fn said_before(status: &Value) -> Option<Said> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Some(Said {
        state: State::named(status["state"].as_str()?)?,
        endpoint: text(&status["endpoint"]),
        trouble: text(&status["lastError"]["message"]),
        event: None,
        at: Instant::now(),
    })
}

/// What stands there when a status is merged into it.
fn merged(mut told: Value, status: Value) -> Value {
    match (&mut told, status) {
        (Value::Object(told), Value::Object(status)) => told.extend(status),
        (told, status) => *told = status,
    }
    told
}

/// Whether a status has to be written; that it is so since another moment is none.
fn differs(told: &Value, status: &Value) -> bool {
    fn plain(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let said = map.iter().filter(|(key, value)| {
                    !value.is_null() && !matches!(key.as_str(), "time" | "lastTransitionTime")
                });
                Value::Object(said.map(|(key, value)| (key.clone(), plain(value))).collect())
            }
            Value::Array(list) => Value::Array(list.iter().map(plain).collect()),
            value => value.clone(),
        }
    }
    let Some(wanted) = status.as_object() else { return true };
    wanted.iter().filter(|(key, _)| *key != "since").any(|(key, value)| plain(&told[key]) != plain(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_differs_by_what_it_says() {
        let status = json!({
            "state": "Up", "since": "2026-01-01T00:00:00Z", "mtu": 1450, "endpoint": null,
            "lastError": { "message": "x", "hint": null, "time": "2026-01-01T00:00:00Z" },
            "conditions": [{ "type": "Up", "lastTransitionTime": "2026-01-01T00:00:00Z" }],
        });
        let mut told = json!({
            "state": "Up", "mtu": 1450, "lastError": { "message": "x", "time": "t" },
            "conditions": [{ "type": "Up", "lastTransitionTime": "t" }],
        });
        assert!(!differs(&told, &status));
        told["mtu"] = json!(1500);
        assert!(differs(&told, &status));
        told["mtu"] = json!(1450);
        told["endpoint"] = json!("gw");
        assert!(differs(&told, &status), "what is not there any more goes");
        told["endpoint"] = Value::Null;
        assert!(!differs(&told, &status));
        told["conditions"] = json!([{ "type": "Up" }, { "type": "Applied" }]);
        assert!(differs(&told, &status), "an edit is taken back");
        assert!(differs(&Value::Null, &status));
    }
}

//! Deadlines as gRPC's callers expect them.
//!
//! tonic answers an expired `grpc-timeout` with CANCELLED, grpc-go with DEADLINE_EXCEEDED; upstream's callers treat the
//! two differently. Streams end with the same code, in their trailers.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

/// When the caller stops waiting for an answer: an extension of requests that came with a timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// The deadline of a request, if its caller set one.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get().copied()
    }

    /// The time that is left.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Reads `grpc-timeout`: at most eight digits and a unit (gRPC over HTTP/2, "Timeout"). One that is malformed is
    /// none, as in tonic.
    pub(crate) fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get("grpc-timeout")?.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let value: u64 = digits.parse().ok()?;
        let timeout = match unit {
            "H" => Duration::from_secs(value * 3600),
            "M" => Duration::from_secs(value * 60),
            "S" => Duration::from_secs(value),
            "m" => Duration::from_millis(value),
            "u" => Duration::from_micros(value),
            "n" => Duration::from_nanos(value),
            _ => return None,
        };
        // Eight digits of hours are 11,000 years: no deadline.
        Instant::now().checked_add(timeout).map(Self)
    }
}

/// The status of an expired deadline; `whose` says which side noticed.
pub(crate) fn exceeded(whose: &str) -> Status {
    Status::deadline_exceeded(format!("context deadline exceeded ({whose})"))
}

/// A server's answer that ends with DEADLINE_EXCEEDED in its trailers when the deadline passes first.
pub(crate) struct DeadlineBody {
    inner: tonic::body::Body,
    expiry: Pin<Box<Sleep>>,
    ended: bool,
}

impl DeadlineBody {
    pub(crate) fn new(inner: tonic::body::Body, deadline: Deadline) -> Self {
        Self { inner, expiry: Box::pin(sleep_until(deadline.0)), ended: false }
    }
}

impl Body for DeadlineBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        if self.expiry.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.ended = true;
        self.inner = tonic::body::Body::empty();
        let mut trailers = HeaderMap::new();
        let status = exceeded("server");
        if status.add_header(&mut trailers).is_err() {
            trailers.insert("grpc-status", HeaderValue::from_static("4"));
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn timeouts_are_read() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_str(text).unwrap());
            Deadline::from_headers(&headers).map(Deadline::remaining)
        };
        for (text, timeout) in [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("15S", Duration::from_secs(15)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("7u", Duration::from_micros(7)),
            ("8n", Duration::from_nanos(8)),
            ("0S", Duration::ZERO),
        ] {
            assert_eq!(read(text), Some(timeout), "{text}");
        }
        for text in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1.5S", " 1S"] {
            assert_eq!(read(text), None, "{text:?}");
        }
    }
}

//! Whether an answer reaches its caller.
//!
//! A handler learns that its caller has left when it is dropped. A caller that leaves just after the handler is done is
//! noticed by nobody else: HTTP/2 then drops the answer unread.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;

/// Put into a response's extensions: called when the answer has been handed to the connection in full, and dropped
/// without being called when the caller has left before.
#[derive(Clone)]
pub struct OnDelivery(Arc<dyn Fn() + Send + Sync>);

impl OnDelivery {
    /// Calls this.
    pub fn new(tell: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }
}

impl fmt::Debug for OnDelivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnDelivery")
    }
}

/// The body of such an answer.
pub(crate) struct DeliveredBody {
    inner: tonic::body::Body,
    tell: Option<OnDelivery>,
}

impl DeliveredBody {
    pub(crate) fn new(inner: tonic::body::Body, tell: OnDelivery) -> Self {
        Self { inner, tell: Some(tell) }
    }
}

impl Body for DeliveredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        // A call's last frame are its trailers.
        let last = match &frame {
            Poll::Ready(Some(Ok(frame))) => frame.is_trailers(),
            Poll::Ready(None) => true,
            Poll::Ready(Some(Err(_))) | Poll::Pending => false,
        };
        if last && let Some(OnDelivery(tell)) = self.tell.take() {
            tell();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

//! Sends together what is written in one turn of the runtime.
//!
//! HTTP/2 flushes the headers of a call before its message is there, and an answer in three parts. Each flush is a system
//! call here and wakes the other process, which then finds too little to go on with. So a flush first lets the tasks run
//! that are ready now, and what they write goes along; nobody waits for a clock.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Beyond it what was written is sent at once.
const ROOM: usize = 64 * 1024;

/// A stream whose flushes wait for one turn, once it is [corked](Corked::cork).
pub(crate) struct Corked<S> {
    stream: S,
    corked: bool,
    /// Written and not sent.
    buffer: Vec<u8>,
    /// How much of the buffer is sent.
    sent: usize,
    /// The flush under way has let others run.
    waited: bool,
}

impl<S> Corked<S> {
    /// Not corked yet: what ends a handshake, such as an alert, is not flushed.
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, corked: false, buffer: Vec::new(), sent: 0, waited: false }
    }

    pub(crate) fn cork(&mut self) {
        self.corked = true;
    }

    pub(crate) fn get_ref(&self) -> &S {
        &self.stream
    }
}

impl<S: AsyncWrite + Unpin> Corked<S> {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.buffer.len() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.buffer[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.sent += sent,
            }
        }
        self.sent = 0;
        self.buffer.clear();
        // One large message must not hold its memory for as long as the connection lives.
        self.buffer.shrink_to(ROOM / 16);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Corked<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Corked<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if !self.corked {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        }
        if self.buffer.len() >= ROOM {
            ready!(self.poll_send(cx))?;
        }
        bufs.iter().for_each(|buf| self.buffer.extend_from_slice(buf));
        Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.buffer.is_empty() && !self.waited {
            self.waited = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_send(cx))?;
        self.waited = false;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, future::poll_fn, task::Waker};

    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// Takes as much as it is told to, each time; what it was given, write by write.
    #[derive(Default)]
    struct Peer {
        takes: VecDeque<usize>,
        got: Vec<Vec<u8>>,
        closed: bool,
    }

    impl AsyncWrite for Peer {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let takes = self.takes.pop_front().unwrap_or(usize::MAX).min(buf.len());
            if takes == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.got.push(buf[..takes].to_vec());
            Poll::Ready(Ok(takes))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.closed = true;
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn what_is_written_and_flushed_in_one_turn_is_one_write() {
        let mut stream = Corked::new(Peer::default());
        stream.write_all(b"hello ").await.unwrap();
        assert_eq!(stream.get_ref().got.len(), 1, "before it is corked all goes at once");
        stream.cork();
        stream.write_all(b"head").await.unwrap();
        // As HTTP/2 does: it goes on with something else while a flush is not done.
        let first = Pin::new(&mut stream).poll_flush(&mut Context::from_waker(Waker::noop()));
        assert!(first.is_pending());
        stream.write_all(b"body").await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(stream.get_ref().got, [b"hello ".to_vec(), b"headbody".to_vec()]);
        stream.flush().await.unwrap();
        stream.write_all(b"last").await.unwrap();
        stream.shutdown().await.unwrap();
        assert!(stream.get_ref().closed);
        assert_eq!(stream.get_ref().got[2], b"last");
    }

    #[tokio::test]
    async fn beyond_its_room_it_does_not_collect() {
        let mut stream = Corked::new(Peer::default());
        stream.cork();
        for _ in 0..100 {
            stream.write_all(&[7; 4096]).await.unwrap();
        }
        assert!(stream.buffer.len() <= ROOM + 4096);
        stream.flush().await.unwrap();
        assert_eq!(stream.get_ref().got.concat(), [7; 100 * 4096]);
        assert!(stream.buffer.capacity() <= ROOM / 16);
    }

    proptest! {
        /// Whatever the peer takes at a time, and whenever there is a flush: all bytes arrive, in order.
        #[test]
        fn every_byte_arrives_in_order(
            writes in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..300), any::<bool>()), 0..40),
            takes in prop::collection::vec(0..200_usize, 0..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (got, wanted) = runtime.block_on(async {
                let mut stream = Corked::new(Peer { takes: takes.into(), ..Peer::default() });
                stream.cork();
                let mut wanted = Vec::new();
                for (bytes, flush) in &writes {
                    stream.write_all(bytes).await.unwrap();
                    wanted.extend_from_slice(bytes);
                    if *flush {
                        poll_fn(|cx| Pin::new(&mut stream).poll_flush(cx)).await.unwrap();
                        assert_eq!(stream.get_ref().got.concat(), wanted);
                    }
                }
                stream.shutdown().await.unwrap();
                (stream.get_ref().got.concat(), wanted)
            });
            prop_assert_eq!(got, wanted);
        }
    }
}

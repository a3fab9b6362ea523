//! The API thread: accepts connections on the control socket and holds each to its limits.
//!
//! One thread with its own runtime, so that no client can slow the guest's devices or the control thread.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use crate::api::control::{Control, ControlThread};
use crate::api::priority::go_before_vcpus;
use crate::api::routes;
use crate::api::socket::{ControlSocket, SocketFile};

/// What a client may take of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; more wait in the socket's backlog.
    pub connections: usize,
    /// How long a request's head may take to arrive, which is also how long a connection may idle between requests.
    pub head: Duration,
    /// How long a request's body may take to arrive.
    pub body: Duration,
    /// How long an operation on the guest may take before its client is told so.
    pub answer: Duration,
    /// How long one connection may live. It bounds a client that sends requests and never reads the answers.
    pub connection: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 32,
            head: Duration::from_secs(10),
            body: Duration::from_secs(30),
            answer: Duration::from_secs(60),
            connection: Duration::from_secs(600),
        }
    }
}

/// How many bytes a request's head may have.
const HEAD_LIMIT: usize = 16 << 10;

/// How many header fields.
const HEADERS_LIMIT: usize = 64;

/// How long answers that are under way may take when the VM ends.
const GOODBYE: Duration = Duration::from_millis(500);

/// The running control socket: two threads and a file. Dropping it ends them and removes the file.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<bool>,
    api: Option<JoinHandle<()>>,
    // Dropped in this order after the API thread has ended, and with it the last mailbox.
    _control: ControlThread,
    _file: SocketFile,
}

impl Server {
    /// Serves `control` on `socket` until dropped.
    ///
    /// # Errors
    /// When the operating system gives no thread or no event queue.
    pub fn start(
        socket: ControlSocket,
        control: impl Control,
        limits: Limits,
    ) -> io::Result<Server> {
        let (control, mailbox) = ControlThread::start(control, limits.answer)?;
        let (listener, file) = socket.into_parts();
        let router = routes::router(mailbox, limits.body);
        let (stop, stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let api = thread::Builder::new().name("api".into()).spawn(move || {
            go_before_vcpus();
            let served = runtime.block_on(accept(listener, router, limits, stopped));
            if let Err(error) = served {
                tracing::error!("the control socket fails: {error}");
            }
        })?;
        Ok(Server {
            stop,
            api: Some(api),
            _control: control,
            _file: file,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(api) = self.api.take()
            && api.join().is_err()
        {
            tracing::error!("the API thread panicked");
        }
    }
}

/// Accepts connections until told to stop, and then lets those that are being answered finish.
async fn accept(
    listener: StdListener,
    router: Router,
    limits: Limits,
    mut stopped: watch::Receiver<bool>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let slots = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let next = tokio::select! {
            () = told_to_stop(&mut stopped) => break,
            next = next_connection(&listener, &slots) => next,
        };
        match next {
            Ok((stream, slot)) => {
                let connection = serve(stream, router.clone(), limits, stopped.clone(), slot);
                connections.spawn(connection);
            }
            Err(error) => {
                // Out of descriptors or memory, most likely: others will free some.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    let goodbye = async { while connections.join_next().await.is_some() {} };
    // Those that are not done by then are dropped with the set.
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    Ok(())
}

/// Returns when the server is to end.
async fn told_to_stop(stopped: &mut watch::Receiver<bool>) {
    // An error means that the server is gone, which is the same.
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn next_connection(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, OwnedSemaphorePermit)> {
    let slot = slots
        .clone()
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

/// Serves one connection to its end.
async fn serve(
    stream: UnixStream,
    router: Router,
    limits: Limits,
    mut stopped: watch::Receiver<bool>,
    _slot: OwnedSemaphorePermit,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_headers(HEADERS_LIMIT)
        .max_buf_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = tokio::time::sleep(limits.connection) => return,
        () = told_to_stop(&mut stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // A client that went away or sent nonsense is its own business.
    if let Err(error) = ended {
        tracing::debug!("connection: {error}");
    }
}

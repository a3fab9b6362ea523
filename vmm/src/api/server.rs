//! The API thread: accepts connections on the control socket and limits each.
//!
//! It is one thread with its own runtime, so that no client can slow down the guest's devices or
//! the control thread. This module knows nothing of the guest.

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
use crate::api::priority::raise_above_vcpus;
use crate::api::routes;
use crate::api::socket::{ControlSocket, SocketFile};

/// Limits on what clients can occupy of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Simultaneous connections; more wait in the socket's backlog.
    pub connections: usize,
    /// How long a request's head may take to arrive, and a connection be idle between requests.
    pub head: Duration,
    /// How long a request's body may take to arrive.
    pub body: Duration,
    /// How long a client waits for an operation on the guest before it gets a timeout.
    pub answer: Duration,
    /// How long one connection may last; this bounds a client that never reads its answers.
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

/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// The most header fields of a request.
const MAX_HEADERS: usize = 64;

/// How long what a client still sends is received and discarded after the last answer.
const LINGER: Duration = Duration::from_secs(2);

/// How long answers in progress may take when the VM ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);

/// The running control socket: two threads and a file. Dropping it ends the threads and removes the
/// file.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<bool>,
    api: Option<JoinHandle<()>>,
    // Dropped in this order, after the API thread and with it the last mailbox.
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
            raise_above_vcpus();
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

/// Accepts connections until the server stops, and then lets answers in progress finish.
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
            () = until_stopped(&mut stopped) => break,
            next = next_connection(&listener, &slots) => next,
        };
        match next {
            Ok((stream, slot)) => {
                let connection = serve(stream, router.clone(), limits, stopped.clone(), slot);
                connections.spawn(connection);
            }
            Err(error) => {
                // Most likely out of descriptors or memory: other connections will free some.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    let rest = async { while connections.join_next().await.is_some() {} };
    // Connections that are still open after that are closed as the set is dropped.
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, rest).await;
    Ok(())
}

/// Returns when the server is to stop.
async fn until_stopped(stopped: &mut watch::Receiver<bool>) {
    // An error means that the server has been dropped, which is the same.
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
    mut stream: UnixStream,
    router: Router,
    limits: Limits,
    mut stopped: watch::Receiver<bool>,
    _slot: OwnedSemaphorePermit,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(&mut stream), TowerToHyperService::new(router));
    let ended = {
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => ended,
            () = tokio::time::sleep(limits.connection) => return,
            () = until_stopped(&mut stopped) => {
                connection.as_mut().graceful_shutdown();
                let _ = connection.await;
                return;
            }
        }
    };
    match ended {
        Ok(()) => {}
        // Such a request is answered, too.
        Err(error) if error.is_parse() => tracing::debug!("connection: {error}"),
        // The client disconnected, or sent no request in time: no fault of the server.
        Err(error) => {
            tracing::debug!("connection: {error}");
            return;
        }
    }
    tokio::select! {
        () = linger(stream) => {}
        () = tokio::time::sleep(LINGER) => {}
        () = until_stopped(&mut stopped) => {}
    }
}

/// Receives and discards what the client still sends, until it closes the connection.
///
/// A request can be answered before its body was received. If the socket were closed then, a client
/// that still sends the body would get an error (EPIPE), and might not read the answer at all.
async fn linger(stream: UnixStream) {
    // The client sees the end of the answers at once.
    let _ = rustix::net::shutdown(&stream, rustix::net::Shutdown::Write);
    let mut discarded = [0; 16 << 10];
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut discarded) {
            Ok(0) => return,
            // A client that sends without a pause must not keep others from being served.
            Ok(_) => tokio::task::yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

//! The control socket: a REST API over a Unix socket, to query and control a running VMM.
//!
//! A request comes through `socket` (the file) and `server` (connections) to `routes` on the API
//! thread, which decodes it: a livepatch module is the body of `POST /patches`, as it is in its
//! `.ko` file. `control` queues the operation and runs it on the control thread; its trait
//! `Control` is implemented by `controller`, which calls the patcher.

mod control;
mod controller;
mod metrics;
mod priority;
mod problem;
mod routes;
mod server;
mod socket;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod types;
mod wait;

pub use control::Control;
pub use controller::Controller;
pub use problem::{Kind, Problem};
pub use routes::MAX_MODULE;
pub use server::{Limits, Server};
pub use socket::{ControlSocket, SocketError};

//! The control socket: a REST API over a Unix socket, to query and control a running VMM.
//!
//! Its parts are independent: `socket` is the file, `server` and `routes` speak HTTP on the
//! API thread, `control` and `controller` work on the guest on the control thread.

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

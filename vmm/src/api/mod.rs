//! The control socket: a REST API over a Unix socket, to query and control a running VMM.
//!
//! Its parts are independent: [`socket`] is the file, [`server`] and [`routes`] speak HTTP on the
//! API thread, [`control`] and [`controller`] work on the guest on the control thread.

pub mod control;
pub mod controller;
mod metrics;
mod priority;
pub mod problem;
pub mod routes;
pub mod server;
pub mod socket;
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
pub use server::{Limits, Server};
pub use socket::{ControlSocket, SocketError};

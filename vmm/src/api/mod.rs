//! The control socket: a small REST over a Unix socket through which a running VMM is asked and told.
//!
//! Three parts that do not know each other's business: [`socket`] (the file), [`server`] and [`routes`] (HTTP, on the API
//! thread), [`control`] (the guest, on the control thread).

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

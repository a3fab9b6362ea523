//! The control socket: a small REST over a Unix socket through which a running VMM is asked and told.
//!
//! Three parts that do not know each other's business: [`socket`] (the file), [`server`] and [`routes`] (HTTP, on the API
//! thread), [`control`] (the guest, on the control thread).

#[cfg(test)]
mod abi_tests;
pub mod control;
mod follow;
#[cfg(test)]
mod follow_tests;
pub mod guest;
mod metrics;
mod priority;
pub mod problem;
pub mod routes;
pub mod server;
pub mod socket;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod wire;

pub use control::Control;
pub use guest::Guest;
pub use problem::{Kind, Problem};
pub use server::{Limits, Server};
pub use socket::{ControlSocket, SocketError};

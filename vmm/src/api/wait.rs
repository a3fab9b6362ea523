//! Answers on a patch that wait for the end of its transition, so that a client need not poll, and
//! that can leave out tasks that have switched.
//!
//! It is used for the answers of requests that were carried out. This module knows the queue to the
//! control thread and nothing of HTTP. A waiting answer costs the guest nothing: the control thread
//! gets no request before a transition ends.

use std::time::Duration;

use patcher::PatchStatus;
use tokio::sync::watch;

use crate::api::control::Mailbox;
use crate::api::problem::{Kind, Problem};
use crate::api::types::{PatchQuery, TaskFilter};

/// The longest time that an answer may wait, well within the lifetime of a connection.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// A wait for the end of a transition, set up before the operation that may start it.
#[derive(Debug)]
pub(super) struct WaitFor {
    mailbox: Mailbox,
    ends: watch::Receiver<()>,
    wait: Duration,
    tasks: TaskFilter,
}

impl WaitFor {
    /// Waits for ends from now on.
    ///
    /// # Errors
    /// `bad-request` when an answer may not wait for so long.
    pub fn new(mailbox: &Mailbox, query: PatchQuery) -> Result<WaitFor, Problem> {
        let wait = Duration::from_millis(query.wait_ms.unwrap_or(0));
        if wait > MAX_WAIT {
            return Err(Problem::new(
                Kind::BadRequest,
                format!("wait_ms is more than {}", MAX_WAIT.as_millis()),
                "send another request when the answer says that the transition still runs",
            ));
        }
        Ok(WaitFor {
            mailbox: mailbox.clone(),
            ends: mailbox.ends(),
            wait,
            tasks: query.tasks,
        })
    }

    /// The status of the patch when its transition ends, or when the time to wait is over.
    ///
    /// # Errors
    /// When the control thread does not answer, or no longer has the patch.
    pub async fn until_ended(mut self, patch: PatchStatus) -> Result<PatchStatus, Problem> {
        let mut patch = patch;
        if patch.transition && !self.wait.is_zero() {
            let ended = tokio::time::timeout(self.wait, self.end(&patch.name)).await;
            patch = match ended {
                Ok(ended) => ended?,
                Err(_) => self.mailbox.patch(patch.name).await?,
            };
        }
        if self.tasks == TaskFilter::Pending {
            patch.tasks.retain(|task| task.switched_by.is_none());
        }
        Ok(patch)
    }

    async fn end(&mut self, name: &str) -> Result<PatchStatus, Problem> {
        loop {
            // An error means that the control thread has ended: the request below says so.
            let _ = self.ends.changed().await;
            let patch = self.mailbox.patch(name.to_owned()).await?;
            if !patch.transition {
                return Ok(patch);
            }
        }
    }
}

#[cfg(test)]
mod tests;

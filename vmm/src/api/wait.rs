//! Answers on a patch that are no sooner and no longer than asked for: they wait for the end of a transition, so that nobody has to
//! ask again and again, and leave out tasks that nobody wants to hear of.
//!
//! Knows the queue to the control thread and nothing of HTTP. Who waits costs the guest nothing: there is no look at it before a
//! transition ends.

use std::time::Duration;

use patcher::PatchStatus;
use tokio::sync::watch;

use crate::api::control::Mailbox;
use crate::api::problem::{Kind, Problem};
use crate::api::types::{AnswerQuery, TasksAsked};

/// The longest that an answer may wait for a transition, well within the life of a connection.
const LONGEST: Duration = Duration::from_secs(60);

/// A look-out for the end of a transition, set up before the operation that may begin it.
#[derive(Debug)]
pub(super) struct WaitFor {
    mailbox: Mailbox,
    ends: watch::Receiver<()>,
    wait: Duration,
    tasks: TasksAsked,
}

impl WaitFor {
    /// Looks out from now on.
    ///
    /// # Errors
    /// `bad-request` when an answer may not wait as long as that.
    pub fn new(mailbox: &Mailbox, query: AnswerQuery) -> Result<WaitFor, Problem> {
        let wait = Duration::from_millis(query.wait_ms.unwrap_or(0));
        if wait > LONGEST {
            return Err(Problem::new(
                Kind::BadRequest,
                format!("wait_ms is more than {}", LONGEST.as_millis()),
                "ask again when the answer says that the transition still runs",
            ));
        }
        Ok(WaitFor {
            mailbox: mailbox.clone(),
            ends: mailbox.ends(),
            wait,
            tasks: query.tasks,
        })
    }

    /// The patch as it is when its transition has ended, or when the wait is over.
    ///
    /// # Errors
    /// When the control thread no longer answers, or no longer knows the patch.
    pub async fn until_the_end(mut self, patch: PatchStatus) -> Result<PatchStatus, Problem> {
        let mut patch = patch;
        if patch.transition && !self.wait.is_zero() {
            let ended = tokio::time::timeout(self.wait, self.end(&patch.name)).await;
            patch = match ended {
                Ok(ended) => ended?,
                Err(_) => self.mailbox.patch(patch.name).await?,
            };
        }
        if self.tasks == TasksAsked::Waiting {
            patch.tasks.retain(|task| task.switched_by.is_none());
        }
        Ok(patch)
    }

    async fn end(&mut self, name: &str) -> Result<PatchStatus, Problem> {
        loop {
            // An error means that the control thread has ended: the look says so.
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

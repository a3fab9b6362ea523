//! Answers that wait for the end of a transition, so that nobody has to ask again and again.
//!
//! Knows the queue to the control thread and nothing of HTTP. Who waits costs the guest nothing: there is no look at it before a
//! transition ends.

use std::time::Duration;

use patcher::PatchStatus;
use tokio::sync::watch;

use super::control::Mailbox;
use super::problem::{Kind, Problem};

/// The longest that an answer may wait for a transition, well within the life of a connection.
const LONGEST: Duration = Duration::from_secs(60);

/// A look-out for the end of a transition, set up before the operation that may begin it.
#[derive(Debug)]
pub(super) struct Follow {
    mailbox: Mailbox,
    ends: watch::Receiver<()>,
    wait: Duration,
}

impl Follow {
    /// Looks out from now on; the answer is to wait for so many milliseconds at most, not at all with `None`.
    ///
    /// # Errors
    /// `bad-request` when that is longer than an answer may wait.
    pub fn new(mailbox: &Mailbox, wait_ms: Option<u64>) -> Result<Follow, Problem> {
        let wait = Duration::from_millis(wait_ms.unwrap_or(0));
        if wait > LONGEST {
            return Err(Problem::new(
                Kind::BadRequest,
                format!("wait_ms is more than {}", LONGEST.as_millis()),
                "ask again when the answer says that the transition still runs",
            ));
        }
        Ok(Follow {
            mailbox: mailbox.clone(),
            ends: mailbox.ends(),
            wait,
        })
    }

    /// The patch as it is when its transition has ended, or when the wait is over.
    pub async fn until_the_end(mut self, patch: PatchStatus) -> Result<PatchStatus, Problem> {
        if self.wait.is_zero() || !patch.transition {
            return Ok(patch);
        }
        let (mailbox, wait) = (self.mailbox.clone(), self.wait);
        match tokio::time::timeout(wait, self.end(&patch.name)).await {
            Ok(ended) => ended,
            Err(_) => mailbox.patch(patch.name).await,
        }
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

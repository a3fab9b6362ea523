//! Lets the guest print on when the transmitter of COM1 has had its time, on the event loop, as
//! long as the output has room.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use crate::console::output::Output;
use crate::devices::legacy::serial::Com1;

/// The subscriber of the event loop that checks the transmitter of COM1.
#[derive(Debug)]
pub struct Transmit {
    com1: Arc<Mutex<Com1<Output>>>,
    output: Output,
}

impl Transmit {
    /// Checks the transmitter of `com1`, which prints to `output`.
    pub fn new(com1: Arc<Mutex<Com1<Output>>>, output: Output) -> Transmit {
        Transmit { com1, output }
    }

    fn com1(&self) -> MutexGuard<'_, Com1<Output>> {
        self.com1.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MutEventSubscriber for Transmit {
    fn init(&mut self, ops: &mut EventOps) {
        let timer = self.com1().transmitter_timer();
        if let Err(e) = ops.add(Events::new_raw(timer, EventSet::IN)) {
            tracing::error!("the guest cannot print: {e:?}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let has_room = self.output.has_room();
        self.com1().check_transmitter(has_room);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::{Duration, Instant};

    use event_manager::{EventManager, SubscriberOps};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::Device;

    /// Much more than the buffers hold.
    const LEN: usize = 2 << 20;

    /// A driver that prints with interrupts, 16 bytes for each, to a console that is not read at
    /// first.
    #[test]
    fn a_guest_that_prints_more_than_is_read_waits_in_the_guest() {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (output, writer) = Output::start(ours.into()).unwrap();
        let irq = event();
        let com1 = Com1::new(irq.try_clone().unwrap(), output.clone(), event()).unwrap();
        let com1 = Arc::new(Mutex::new(com1));
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        let transmit = Transmit::new(Arc::clone(&com1), output.clone());
        events.add_subscriber(Box::new(transmit));

        com1.lock().unwrap().write(1, &[2]);
        let mut printed = 0;
        let mut silent_since = Instant::now();
        let mut reader = None;
        while printed < LEN {
            if irq.read().is_ok() {
                com1.lock().unwrap().write(0, &[b'x'; 16]);
                printed += 16;
                silent_since = Instant::now();
            } else {
                events.run_with_timeout(20).unwrap();
            }
            assert!(!output.is_full(), "a vCPU would wait");
            let limit = if reader.is_some() { 10_000 } else { 300 };
            if silent_since.elapsed() > Duration::from_millis(limit) {
                assert!(reader.is_none(), "it prints no more, although it is read");
                silent_since = Instant::now();
                let mut theirs = theirs.try_clone().unwrap();
                reader = Some(thread::spawn(move || {
                    let mut all = Vec::new();
                    theirs.read_to_end(&mut all).unwrap();
                    all.len()
                }));
            }
        }
        assert!(output.drain(None));
        drop((com1, events, output, writer));
        assert_eq!(reader.unwrap().join().unwrap(), printed);
    }
}

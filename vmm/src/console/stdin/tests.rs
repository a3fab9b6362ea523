//! Input from a terminal: what a guest that does not take it at once gets, and when it gets it.

use std::fs::File;
use std::thread;

use event_manager::{EventManager, SubscriberOps};

use super::*;
use crate::console::terminal::testing::{is_cooked, pty};
use crate::devices::Device;

type SharedCom1 = Arc<Mutex<Com1<Vec<u8>>>>;

/// An event loop with a console on a terminal, of which the test is the user and the guest.
struct Bench {
    events: EventManager<Box<dyn MutEventSubscriber>>,
    com1: SharedCom1,
    quit: EventFd,
    user: File,
    /// Another descriptor of the terminal, so that it stays when the console is dropped.
    program: OwnedFd,
}

impl Bench {
    fn new() -> Bench {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (user, program) = pty();
        let (taken, quit) = (event(), event());
        let com1 = Com1::new(event(), Vec::new(), taken.try_clone().unwrap()).unwrap();
        let com1 = Arc::new(Mutex::new(com1));
        let stdin = Stdin::new(
            program.try_clone().unwrap(),
            Arc::clone(&com1),
            taken,
            quit.try_clone().unwrap(),
            event(),
        )
        .unwrap();
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        events.add_subscriber(Box::new(stdin));
        Bench {
            events,
            com1,
            quit,
            user,
            program,
        }
    }

    /// Runs the event loop until nothing has come for a while.
    fn settle(&mut self) {
        while self.events.run_with_timeout(300).unwrap() != 0 {}
    }

    fn waiting(&self) -> usize {
        self.com1.lock().unwrap().waiting()
    }

    /// Types `text` as fast as the terminal takes it, in a thread.
    fn paste(&self, text: Vec<u8>) -> thread::JoinHandle<()> {
        let mut user = self.user.try_clone().unwrap();
        thread::spawn(move || user.write_all(&text).unwrap())
    }

    /// All that a guest reads until the receiver is empty.
    fn take(&self) -> Vec<u8> {
        let mut com1 = self.com1.lock().unwrap();
        com1.write(1, &[1]);
        let mut read = |offset| {
            let mut byte = [0];
            com1.read(offset, &mut byte);
            byte[0]
        };
        let mut got = Vec::new();
        while read(5) & 1 == 1 {
            got.push(read(0));
        }
        got
    }
}

fn text(len: usize) -> Vec<u8> {
    (b'a'..=b'z').cycle().take(len).collect()
}

#[test]
fn pasted_text_is_kept_until_the_guest_takes_it_and_ctrl_a_works_after_it() {
    let mut bench = Bench::new();
    let paste = bench.paste(text(100_000));
    bench.settle();
    paste.join().unwrap();
    assert_eq!(bench.waiting(), 100_000, "nothing of it is lost");
    bench.user.write_all(b"\x01x").unwrap();
    bench.settle();
    assert_eq!(bench.quit.read().unwrap(), 1);
    assert_eq!(bench.take(), text(100_000));
}

#[test]
fn a_terminal_is_not_read_while_too_much_waits() {
    let mut bench = Bench::new();
    let paste = bench.paste(text(3 << 20));
    let mut got = Vec::new();
    while got.len() < 3 << 20 {
        bench.settle();
        assert!(bench.waiting() < MAX_WAITING_TYPED + CHUNK);
        let more = bench.take();
        assert!(!more.is_empty(), "{} bytes arrived", got.len());
        got.extend(more);
    }
    paste.join().unwrap();
    assert_eq!(got, text(3 << 20));
}

#[test]
fn the_terminal_is_raw_while_the_console_is_on_it() {
    let bench = Bench::new();
    assert!(!is_cooked(&bench.program));
    drop(bench.events);
    assert!(is_cooked(&bench.program));
}

//! The protocol on the virtio port of a nested bed. A frame is a length (u32, little endian), a
//! kind (u8), and as many bytes of payload as the length says.
//!
//! The other end is `guests/programs/bed-init.c`. This module must not know of processes.

use std::io::{self, Read, Write};

/// A limit on the payload in bytes; the other end sends at most 64 KiB.
const MAX_FRAME: u32 = 1 << 20;

/// The kinds of frames that are sent to the bed.
#[derive(Debug, Clone, Copy)]
pub(super) enum ToBed {
    Stdin = 1,
    EndOfInput = 2,
    /// Payload: rows and columns in decimal, with a space between.
    TerminalSize = 3,
    /// The command, as [`command_spec`](super::command_spec) encodes it.
    Spec = 4,
}

/// The frames that the bed sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FromBed {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// The command's status, as waitpid(2) returned it.
    Status(i32),
    /// The command is about to start.
    Ready,
    /// The bed could not be set up, for this reason.
    Failed(String),
    /// A heartbeat while the command prints nothing.
    Alive,
}

pub(super) fn send(to: &mut impl Write, kind: ToBed, payload: &[u8]) -> io::Result<()> {
    let size = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(payload.len() + 5);
    frame.extend_from_slice(&size.to_le_bytes());
    frame.push(kind as u8);
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

pub(super) fn receive(from: &mut impl Read) -> io::Result<FromBed> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [a, b, c, d, kind] = head;
    let size = u32::from_le_bytes([a, b, c, d]);
    if size > MAX_FRAME {
        return Err(io::Error::other(format!("a frame of {size} bytes")));
    }
    let mut payload = Vec::new();
    from.take(u64::from(size)).read_to_end(&mut payload)?;
    if payload.len() as u64 != u64::from(size) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match kind {
        1 => Ok(FromBed::Stdout(payload)),
        2 => Ok(FromBed::Stderr(payload)),
        3 => match payload.as_slice().try_into() {
            Ok(raw) => Ok(FromBed::Status(i32::from_le_bytes(raw))),
            Err(_) => Err(io::Error::other("a status that is not 4 bytes")),
        },
        4 => Ok(FromBed::Ready),
        5 => Ok(FromBed::Failed(
            String::from_utf8_lossy(&payload).into_owned(),
        )),
        6 => Ok(FromBed::Alive),
        other => Err(io::Error::other(format!("a frame of kind {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_and_unknown_frames_are_errors() {
        let bytes = [3, 0, 0, 0, 1, b'a', b'b', b'c', 4, 0, 0, 0, 3, 0, 7, 0, 0];
        let mut from = bytes.as_slice();
        assert_eq!(
            receive(&mut from).unwrap(),
            FromBed::Stdout(b"abc".to_vec())
        );
        assert_eq!(receive(&mut from).unwrap(), FromBed::Status(0x700));
        assert!(receive(&mut from).is_err());
        assert!(receive(&mut &bytes[..6]).is_err());
        assert!(receive(&mut [0xff, 0xff, 0xff, 0xff, 1].as_slice()).is_err());
        assert!(receive(&mut [0, 0, 0, 0, 9].as_slice()).is_err());
    }
}

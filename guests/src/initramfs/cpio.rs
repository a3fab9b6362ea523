//! Writes `newc` cpio archives, the format of an initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! This module knows folders, files, links and device nodes; it must not know what goes into an
//! initramfs.

use std::collections::BTreeSet;

/// An archive that entries can be added to.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    /// An empty archive.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a folder and its parents, unless they are in the archive already.
    pub fn folder(&mut self, path: &str) {
        let path = path.trim_matches('/');
        let ends = path.match_indices('/').map(|(i, _)| i).chain([path.len()]);
        for end in ends {
            let part = path.get(..end).unwrap_or_default();
            if !part.is_empty() && self.folders.insert(part.to_owned()) {
                self.entry(part, FOLDER, (0, 0), b"");
            }
        }
    }

    /// Adds a regular file with these permission bits, after its parents.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.add_parents(path);
        self.entry(path, FILE | (permissions & 0o7777), (0, 0), content);
    }

    /// Adds a symbolic link, after its parents.
    pub fn link(&mut self, path: &str, target: &str) {
        self.add_parents(path);
        self.entry(path, LINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device, after its parents.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.add_parents(path);
        self.entry(path, CHARACTER_DEVICE, (major, minor), b"");
    }

    /// Ends the archive and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }

    fn add_parents(&mut self, path: &str) {
        if let Some((folder, _)) = path.trim_start_matches('/').rsplit_once('/') {
            self.folder(folder);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let name = path.trim_start_matches('/');
        self.entries += 1;
        let fields = [
            u64::from(self.entries),
            u64::from(mode),
            0,
            0,
            1,
            0,
            content.len() as u64,
            0,
            0,
            u64::from(device.0),
            u64::from(device.1),
            name.len() as u64 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        let size = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(size, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses an archive into (name, mode, content) of each entry, and checks its framing.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut at = 0;
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * i..at + 14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = &bytes[at + 110..at + 110 + name_size - 1];
            let name = String::from_utf8(name.to_vec()).unwrap();
            let start = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return found;
            }
            found.push((name, field(1), bytes[start..start + size].to_vec()));
            at = (start + size).next_multiple_of(4);
        }
    }

    #[test]
    fn entries_follow_their_parents_and_each_folder_is_added_once() {
        let mut archive = Archive::new();
        archive.file("/a/b/one", 0o644, b"1");
        archive.file("/a/b/three", 0o755, b"333");
        archive.link("/a/link", "b/one");
        archive.device("/dev/console", 5, 1);
        let found = read(&archive.finish());
        let names: Vec<&str> = found.iter().map(|e| e.0.as_str()).collect();
        assert_eq!(
            names,
            [
                "a",
                "a/b",
                "a/b/one",
                "a/b/three",
                "a/link",
                "dev",
                "dev/console"
            ]
        );
        assert_eq!(found[3].1, 0o100_755);
        assert_eq!(found[3].2, b"333");
        assert_eq!(found[4].2, b"b/one");
        assert_eq!(found[6].1, 0o020_600);
    }
}

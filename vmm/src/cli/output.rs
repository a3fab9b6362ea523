//! The output of commands: lines of text, aligned columns and JSON, with colours only on a
//! terminal.
//!
//! Names come from the guest: control characters, on which a terminal would act, are replaced.

use std::io::{self, BufWriter, IsTerminal, Write};

use serde::Serialize;

/// What a line says, which decides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Without a colour.
    Plain,
    /// A heading.
    Strong,
    /// Completed, running, reliable.
    Good,
    /// In progress, pending, paused.
    Busy,
    /// Not reliable.
    Bad,
}

impl Tone {
    fn code(self) -> &'static str {
        match self {
            Tone::Plain => "",
            Tone::Strong => "\x1b[1m",
            Tone::Good => "\x1b[32m",
            Tone::Busy => "\x1b[33m",
            Tone::Bad => "\x1b[31m",
        }
    }
}

/// The most lines of one kind that a command prints without `--verbose`.
pub const MAX_LINES: usize = 20;

/// Standard output, or the buffer of a test.
pub struct Output<'a> {
    out: Box<dyn Write + 'a>,
    colour: bool,
}

impl Output<'_> {
    /// Standard output; in colour when it is a terminal and `NO_COLOR` is not set.
    pub fn stdout() -> Output<'static> {
        Output {
            out: Box::new(BufWriter::new(io::stdout().lock())),
            colour: in_colour(&io::stdout()),
        }
    }

    /// Prints a line.
    pub fn line(&mut self, tone: Tone, text: &str) -> io::Result<()> {
        let text = printable(text);
        let code = tone.code();
        if self.colour && !code.is_empty() {
            writeln!(self.out, "{code}{text}\x1b[0m")?;
        } else {
            writeln!(self.out, "{text}")?;
        }
        // A transition is watched by these lines.
        self.out.flush()
    }

    /// Prints lines: without `all` at most [`MAX_LINES`], and then how many were left out.
    pub fn lines(
        &mut self,
        tone: Tone,
        lines: impl IntoIterator<Item = String>,
        all: bool,
    ) -> io::Result<()> {
        let mut lines = lines.into_iter();
        let shown = if all { usize::MAX } else { MAX_LINES };
        for line in lines.by_ref().take(shown) {
            self.line(tone, &line)?;
        }
        match lines.count() {
            0 => Ok(()),
            more => self.more(more),
        }
    }

    /// Prints how many lines were left out.
    pub fn more(&mut self, count: usize) -> io::Result<()> {
        self.line(Tone::Plain, &format!("and {count} more (-v lists all)"))
    }

    /// Prints a line of fields separated by tabs. It is buffered until [`flush`](Self::flush), as
    /// such lines are many.
    pub fn fields(&mut self, fields: &[&str]) -> io::Result<()> {
        let fields: Vec<String> = fields.iter().map(|field| printable(field)).collect();
        writeln!(self.out, "{}", fields.join("\t"))
    }

    /// Writes out all buffered lines.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Prints JSON, indented.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut self.out, value)?;
        writeln!(self.out)?;
        self.out.flush()
    }

    /// Prints columns as wide as their widest cell, under a heading. Columns of numbers are aligned
    /// to the right.
    pub fn table(&mut self, head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
        let columns: Vec<Column> = head
            .iter()
            .enumerate()
            .map(|(index, head)| Column::of(head, rows.iter().filter_map(|row| row.get(index))))
            .collect();
        let head: Vec<String> = head.iter().map(ToString::to_string).collect();
        self.line(Tone::Strong, &join(&columns, &head))?;
        for row in rows {
            self.line(Tone::Plain, &join(&columns, row))?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Output<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output")
            .field("colour", &self.colour)
            .finish_non_exhaustive()
    }
}

/// Whether text on this stream is printed in colour: on a terminal, unless `NO_COLOR` is set.
pub fn in_colour(stream: &impl IsTerminal) -> bool {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !no_colour
}

/// The width and the alignment of a column.
struct Column {
    width: usize,
    right: bool,
}

impl Column {
    fn of<'a>(head: &str, cells: impl Iterator<Item = &'a String> + Clone) -> Column {
        let number = |cell: &String| {
            cell == "-" || cell.trim_start_matches('-').parse::<u64>().is_ok() || cell.is_empty()
        };
        let width = cells.clone().map(|cell| cell.chars().count());
        Column {
            width: width.max().unwrap_or(0).max(head.chars().count()),
            right: cells.clone().next().is_some() && cells.clone().all(number),
        }
    }
}

fn join(columns: &[Column], cells: &[String]) -> String {
    let set = columns.iter().zip(cells).map(|(column, cell)| {
        let width = column.width;
        if column.right {
            format!("{cell:>width$}")
        } else {
            format!("{cell:<width$}")
        }
    });
    let line = set.collect::<Vec<_>>().join(" ");
    line.trim_end().to_owned()
}

/// `text` with each control character replaced by a question mark, as `ps` does.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(print: impl FnOnce(&mut Output<'_>) -> io::Result<()>, colour: bool) -> String {
        let mut buffer = Vec::new();
        let mut output = Output {
            out: Box::new(&mut buffer),
            colour,
        };
        print(&mut output).unwrap();
        drop(output);
        String::from_utf8(buffer).unwrap()
    }

    #[test]
    fn columns_align_numbers_right_and_words_left() {
        let rows = [
            vec!["1".to_owned(), "init".into(), "0".into(), "sh".into()],
            vec![
                "1234".to_owned(),
                "k".into(),
                "-".into(),
                "kworker/0:1".into(),
            ],
        ];
        let text = printed(|s| s.table(&["PID", "KIND", "VCPU", "COMM"], &rows), false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines,
            [
                " PID KIND VCPU COMM",
                "   1 init    0 sh",
                "1234 k       - kworker/0:1",
            ]
        );
    }

    #[test]
    fn many_lines_are_cut_short_unless_all_are_wanted() {
        let lines = |count: usize| (0..count).map(|n| n.to_string());
        let count = |count, all| {
            let text = printed(|o| o.lines(Tone::Plain, lines(count), all), false);
            (
                text.lines().count(),
                text.ends_with("more (-v lists all)\n"),
            )
        };
        assert_eq!(count(MAX_LINES, false), (MAX_LINES, false));
        assert_eq!(count(MAX_LINES + 1, false), (MAX_LINES + 1, true));
        assert_eq!(count(10_000, false), (MAX_LINES + 1, true));
        assert_eq!(count(10_000, true), (10_000, false));
    }

    #[test]
    fn a_name_from_the_guest_cannot_control_the_terminal() {
        let text = printed(|s| s.line(Tone::Plain, "a\x1b[2Jb\nc\u{9b}d"), false);
        assert_eq!(text, "a?[2Jb?c?d\n");
    }

    #[test]
    fn colours_are_only_used_on_a_terminal() {
        assert_eq!(printed(|s| s.line(Tone::Good, "ok"), false), "ok\n");
        assert_eq!(
            printed(|s| s.line(Tone::Good, "ok"), true),
            "\x1b[32mok\x1b[0m\n"
        );
        assert_eq!(printed(|s| s.line(Tone::Plain, "ok"), true), "ok\n");
    }
}

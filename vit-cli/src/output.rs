//! Output: buffered stdout, names that are safe to print, and numbers formatted like Python's.

use std::io::{self, BufWriter, StdoutLock, Write};

use serde_json::{Value, json};
use vit_model::labels::Prediction;
pub use vit_model::printable::{cell, escape, line, name, recovered, show};

/// The length limit of a message on stderr, in bytes.
const MAX_MESSAGE: usize = 8 << 10;

/// The reader of stdout closed it (as `| head` does). This is not a failure, so the program just stops.
#[derive(Debug)]
pub struct ReaderGone;

impl std::fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for ReaderGone {}

/// Buffered stdout. A closed pipe is reported as [`ReaderGone`], and anything else, such as a full disk, as an error.
pub struct Stdout(BufWriter<StdoutLock<'static>>);

impl Stdout {
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(64 << 10, io::stdout().lock()))
    }

    pub fn write(&mut self, text: &str) -> anyhow::Result<()> {
        self.0.write_all(text.as_bytes()).map_err(stdout_error)
    }

    pub fn line(&mut self, text: &str) -> anyhow::Result<()> {
        self.write(text)?;
        self.write("\n")
    }

    /// Writes out the buffer. Every command that prints calls this last.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        self.0.flush().map_err(stdout_error)
    }
}

fn stdout_error(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        anyhow::Error::new(ReaderGone)
    } else {
        anyhow::Error::new(error).context("standard output")
    }
}

/// Escapes a message and limits its length, for stderr.
pub fn message(text: &str) -> String {
    let mut out = escape(text);
    if out.len() > MAX_MESSAGE {
        let mut end = MAX_MESSAGE;
        while !out.is_char_boundary(end) {
            end -= 1;
        }
        out.truncate(end);
        out.push('…');
    }
    out
}

/// A class of a prediction in JSON; what a regression predicts is a `value` without a probability.
pub fn prediction(p: &Prediction) -> Value {
    if p.probability.is_nan() {
        json!({"class": p.class, "label": p.label, "value": p.logit})
    } else {
        json!({"class": p.class, "label": p.label, "probability": p.probability, "logit": p.logit})
    }
}

/// A JSON value on one line. Escapes DEL, which serde_json does not, because some terminals interpret it.
pub fn json_line(value: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string(value)?.replace('\u{7f}', "\\u007f"))
}

/// A JSON value, indented.
pub fn json_pretty(value: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)?.replace('\u{7f}', "\\u007f"))
}

/// A label in at most `length` characters.
pub fn short(label: &str, length: usize) -> String {
    if label.chars().count() <= length {
        return label.into();
    }
    label.chars().take(length.saturating_sub(1)).collect::<String>() + "…"
}

/// Rows of CSV as text.
pub fn csv(fill: impl FnOnce(&mut csv::Writer<Vec<u8>>) -> csv::Result<()>) -> anyhow::Result<String> {
    let mut rows = csv::Writer::from_writer(Vec::new());
    fill(&mut rows)?;
    let bytes = rows.into_inner().map_err(csv::IntoInnerError::into_error)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Formats a number like Python's `format(value, ".3")`: three significant digits, at least one digit after the point, and an
/// exponent for magnitudes from 100 on and below 0.0001.
pub fn python_3(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "nan"
        } else if value > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    // `{:.2e}` rounds to three digits like C's printf: it rounds the exact binary value, and ties go to even
    let rounded = format!("{value:.2e}");
    let (mantissa, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..2).contains(&exponent) {
        let decimals = usize::try_from(2 - exponent).unwrap_or(0);
        let rounded: f64 = rounded.parse().unwrap_or(value);
        let fixed = format!("{rounded:.decimals$}");
        let trimmed = fixed.trim_end_matches('0');
        if trimmed.ends_with('.') { format!("{trimmed}0") } else { trimmed.into() }
    } else {
        let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.abs())
    }
}

/// Formats `1234567` as `1,234,567`.
pub fn thousands(n: u128) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_as_python_prints_them() {
        // written by tests/fixtures/cli/python_format.py
        let table = include_str!("../../tests/fixtures/cli/python_format.tsv");
        for line in table.lines() {
            let (value, want) = line.split_once('\t').unwrap();
            assert_eq!(python_3(value.parse().unwrap()), want, "{value}");
        }
        assert!(table.lines().count() > 300);
        assert_eq!(python_3(f64::NAN), "nan");
    }

    #[test]
    fn names_are_one_printable_line() {
        assert_eq!(show("plain näme ☃.png"), "plain näme ☃.png");
        assert_eq!(show("a\nb\t\x1b[31m\u{202e}"), "a\\nb\\t\\u{1b}[31m\\u{202e}");
        #[cfg(unix)]
        {
            use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};
            assert_eq!(show(OsStr::from_bytes(b"\xff\xc3(\xe2\x98\x83")), "\\xff\\xc3(☃");
        }
        let long = message(&"é".repeat(MAX_MESSAGE));
        assert!(long.len() <= MAX_MESSAGE + '…'.len_utf8() && long.ends_with('…'));
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn json_has_no_raw_control_characters() {
        assert_eq!(json_line(&"a\u{7f}\u{1}\n").unwrap(), r#""a\u007f\u0001\n""#);
    }
}

//! Names and texts as one printable line, for programs that show what a file or a server wrote.

use std::ffi::OsStr;
use std::fmt::Write as _;

/// A name as one printable line. Control characters and characters that change the direction of text are escaped, and bytes
/// that are not UTF-8 become `\xff`.
pub fn show(name: impl AsRef<OsStr>) -> String {
    let mut out = String::new();
    for chunk in name.as_ref().as_encoded_bytes().utf8_chunks() {
        out.push_str(&escape(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Escapes control characters and characters that change the direction of text, so that the text is one printable line.
pub fn escape(text: &str) -> String {
    let unsafe_char = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if unsafe_char(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

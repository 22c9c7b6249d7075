//! Names and texts as one printable line, for programs that show what a file or a server wrote.

use std::ffi::{OsStr, OsString};
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
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Control characters, and characters that change the direction of text.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// What the name of a file begins with if it is written by its bytes.
const BYTES: &str = "bytes:";

/// A name that [`recover`] turns back, for JSON, which has escapes of its own: as it is if it is UTF-8. Otherwise, and if it
/// begins with `bytes:` itself, that prefix and the name with `%` and what is not UTF-8 percent-encoded.
pub fn name<S: AsRef<OsStr>>(name: S) -> String {
    encoded(name.as_ref(), |_| false)
}

/// As [`name`], for CSV, which quotes lines and tabs: other unsafe characters are percent-encoded, too.
pub fn cell<S: AsRef<OsStr>>(name: S) -> String {
    encoded(name.as_ref(), |c| is_unsafe(c) && !matches!(c, '\n' | '\r' | '\t'))
}

/// As [`name`], for text, where it is one printable line: every unsafe character is percent-encoded, too.
pub fn line<S: AsRef<OsStr>>(name: S) -> String {
    encoded(name.as_ref(), is_unsafe)
}

fn encoded(name: &OsStr, encode: impl Fn(char) -> bool) -> String {
    if let Some(text) = name.to_str()
        && !text.starts_with(BYTES)
        && !text.contains(&encode)
    {
        return text.into();
    }
    let mut out = String::from(BYTES);
    let percent = |out: &mut String, bytes: &[u8]| {
        for byte in bytes {
            let _ = write!(out, "%{byte:02X}");
        }
    };
    for chunk in name.as_encoded_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            if c == '%' || encode(c) { percent(&mut out, c.encode_utf8(&mut [0; 4]).as_bytes()) } else { out.push(c) }
        }
        percent(&mut out, chunk.invalid());
    }
    out
}

/// The name itself that [`name`], [`cell`] or [`line`](line()) has written. Where names are not bytes, what is not UTF-8 is lost.
pub fn recovered(written: &str) -> OsString {
    #[cfg(unix)]
    return std::os::unix::ffi::OsStringExt::from_vec(recover(written));
    #[cfg(not(unix))]
    String::from_utf8_lossy(&recover(written)).into_owned().into()
}

/// The bytes of the name that [`name`], [`cell`] or [`line`](line()) has written.
pub fn recover(written: &str) -> Vec<u8> {
    let Some(rest) = written.strip_prefix(BYTES) else { return written.into() };
    let (mut bytes, mut rest) = (Vec::new(), rest.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| first == b'%').and_then(|two| std::str::from_utf8(two).ok());
        if let Some(byte) = digits.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            bytes.push(byte);
            rest = after.get(2..).unwrap_or_default();
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_told_apart_and_recovered() {
        let mut names: Vec<Vec<u8>> = [
            "plain.png",
            "a\nb",
            "a\\nb",
            "100%",
            "%41",
            "bytes:a",
            "bytes:%41",
            "näme ☃.png",
            "\u{1b}[31m",
            "a\u{202e}b",
            "",
        ]
        .map(|name| name.as_bytes().to_vec())
        .into();
        #[cfg(unix)]
        names.extend([b"\xff".to_vec(), b"\xfe".to_vec(), b"a\xc3(%".to_vec(), b"bytes:\xff".to_vec()]);
        for write in [name::<&OsStr>, cell::<&OsStr>, line::<&OsStr>] {
            let mut seen = std::collections::BTreeSet::new();
            for bytes in &names {
                #[cfg(unix)]
                let given: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(bytes.as_slice());
                #[cfg(not(unix))]
                let given = OsStr::new(std::str::from_utf8(bytes).unwrap());
                let written = write(given);
                assert_eq!(recover(&written), *bytes, "{written:?}");
                assert!(seen.insert(written));
            }
        }
        assert_eq!(name("näme\n"), "näme\n");
        assert_eq!(cell("a\nb"), "a\nb");
        assert_eq!(line("a\nb%"), "bytes:a%0Ab%25");
        assert!(!cell("\u{1b}[31m").contains('\u{1b}'));
    }
}

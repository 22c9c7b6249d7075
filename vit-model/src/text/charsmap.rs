//! Checks SentencePiece's compiled character map, which the `tokenizers` library follows without looking where it leads.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

/// Checks a map in base64: the size of a double-array trie in four bytes, the trie, and the texts that its leaves point to.
///
/// # Errors
/// A size beyond the end, or a unit of the trie that leads out of it or into the middle of a character.
pub(super) fn check(base64: &str) -> Result<(), String> {
    let bytes = decode(base64).ok_or("is not base64")?;
    let (size, rest) = bytes.split_first_chunk::<4>().ok_or("is too short")?;
    let size = usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX);
    let (trie, texts) = rest.split_at_checked(size).ok_or("says that it is larger than it is")?;
    let texts = std::str::from_utf8(texts).map_err(|_| "holds text that is not UTF-8")?;
    let (units, []) = trie.as_chunks::<4>() else { return Err("has a trie that is not made of 4-byte units".into()) };
    // a label selects one of 256 neighbours, so whole blocks of them must exist
    if units.is_empty() || !units.len().is_multiple_of(256) {
        return Err(format!("has a trie of {} units, expected a multiple of 256", units.len()));
    }
    let unit = |at: usize| units.get(at).map(|unit| u32::from_le_bytes(*unit));
    for (at, bytes) in units.iter().enumerate() {
        let u = u32::from_le_bytes(*bytes);
        if u & LEAF != 0 {
            continue; // holds a value, and nothing leads on from it
        }
        let next = at ^ usize::try_from(u64::from(u >> 10) << ((u & (1 << 9)) >> 6)).unwrap_or(usize::MAX);
        let target = unit(next).ok_or_else(|| format!("has a unit {at} that leads out of the trie"))?;
        if u & (1 << 8) != 0 {
            let text = usize::try_from(target & !LEAF).unwrap_or(usize::MAX);
            if !texts.is_char_boundary(text) {
                return Err(format!("has a unit {at} that points to no text"));
            }
        }
    }
    Ok(())
}

/// Marks a unit that holds a value.
const LEAF: u32 = 1 << 31;

/// Standard base64 with padding.
fn decode(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(u32::from(c.wrapping_sub(b'A'))),
        b'a'..=b'z' => Some(u32::from(c.wrapping_sub(b'a')).wrapping_add(26)),
        b'0'..=b'9' => Some(u32::from(c.wrapping_sub(b'0')).wrapping_add(52)),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut out = Vec::with_capacity(text.len());
    for quad in text.as_bytes().chunks(4) {
        let kept = quad.iter().take_while(|&&c| c != b'=').count();
        let value = quad.iter().take(kept).try_fold(0_u32, |value, &c| Some(value << 6 | digit(c)?))?;
        let bytes = match kept {
            4 => value << 8,
            3 => value << 14,
            2 => value << 20,
            _ => return None,
        };
        out.extend(bytes.to_be_bytes().iter().take(kept.wrapping_sub(1)));
    }
    Some(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]
mod tests {
    use super::*;

    fn encode(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut out = String::new();
        for part in bytes.chunks(3) {
            let value = part.iter().fold(0_u32, |v, &b| v << 8 | u32::from(b)) << (8 * (3 - part.len()));
            for i in 0..4 {
                let digit = DIGITS.get((value >> (18 - 6 * i) & 63) as usize).copied().unwrap();
                out.push(if i <= part.len() { char::from(digit) } else { '=' });
            }
        }
        out
    }

    /// A map with some units set, of 256 that are zero, and its texts.
    fn map(units: &[(usize, u32)], texts: &str) -> String {
        let mut trie = vec![0_u32; 256];
        for &(at, unit) in units {
            *trie.get_mut(at).unwrap() = unit;
        }
        let trie: Vec<u8> = trie.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        encode(&[&(trie.len() as u32).to_le_bytes()[..], &trie, texts.as_bytes()].concat())
    }

    #[test]
    fn base64_is_read_back() {
        for bytes in [&b""[..], b"a", b"ab", b"abc", b"\xff\x00\xfe\x01"] {
            assert_eq!(decode(&encode(bytes)).unwrap(), bytes);
        }
        assert!(decode("A").is_none() && decode("A-==").is_none());
    }

    #[test]
    fn a_unit_may_lead_only_into_the_trie_and_to_whole_characters() {
        check(&map(&[], "")).unwrap();
        check(&map(&[(1, 1 << 8 | 2 << 10), (3, LEAF | 3)], "abé")).unwrap_err();
        check(&map(&[(1, 1 << 8 | 2 << 10), (3, LEAF | 2)], "abé")).unwrap();
        assert!(check(&map(&[(1, 256 << 10)], "")).unwrap_err().contains("leads out"));
        assert!(check(&map(&[(1, 1 << 8 | 2 << 10), (3, LEAF | 9)], "abé")).unwrap_err().contains("no text"));
    }

    #[test]
    fn a_size_beyond_the_end_is_refused_before_anything_is_allocated_for_it() {
        assert!(check(&encode(&u32::MAX.to_le_bytes())).unwrap_err().contains("larger than it is"));
        assert!(check("!").is_err() && check("").is_err());
    }
}

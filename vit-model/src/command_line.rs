//! Values of options that several programs have.

use crate::limits::INPUT_SIDE;

/// `224`, or `224x320`: height and width of an image in pixels.
///
/// # Errors
/// What is expected instead.
pub fn img_size(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.trim().parse::<usize>().ok().filter(|n| (1..=INPUT_SIDE).contains(n));
    let (h, w) = text.split_once(['x', '×']).unwrap_or((text, text));
    match (side(h), side(w)) {
        (Some(h), Some(w)) => Ok([h, w]),
        _ => Err(format!("expected a number of pixels up to {INPUT_SIDE}, or HEIGHTxWIDTH")),
    }
}

#[cfg(test)]
mod tests {
    use super::img_size;

    #[test]
    fn a_size_is_one_number_or_two() {
        assert_eq!(img_size("224"), Ok([224, 224]));
        assert_eq!(img_size("224x320"), Ok([224, 320]));
        assert_eq!(img_size("224 × 320"), Ok([224, 320]));
        for bad in ["", "0", "-1", "224x", "x224", "99999999", "224x224x3", "two"] {
            assert!(img_size(bad).is_err(), "{bad}");
        }
    }
}

//! The class names of ImageNet's subsets, for checkpoints that say which subset they were trained on but name no classes.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::io::Read as _;

use flate2::read::GzDecoder;

/// Sorted lines: a synset's number, the subsets that contain it, and its first word. `tools/imagenet/make.py` writes it.
const SYNSETS: &[u8] = include_bytes!("../imagenet/synsets.gz");

/// A subset of ImageNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subset {
    /// What a tag calls it: `in1k`.
    tag: &'static str,
    /// What people call it.
    pub name: &'static str,
    classes: usize,
    /// Its bit in `SYNSETS`.
    bit: u32,
    /// Whether the classes of ImageNet-1k come before all others.
    small_first: bool,
}

const IN1K: Subset = Subset { tag: "in1k", name: "ImageNet-1k", classes: 1000, bit: 0, small_first: false };

/// All subsets; several have the same tag, and are told apart by their number of classes.
const SUBSETS: [Subset; 7] = [
    IN1K,
    Subset { tag: "in12k", name: "ImageNet-12k", classes: 11821, bit: 1, ..IN1K },
    Subset { tag: "in22k", name: "ImageNet-22k", classes: 21841, bit: 2, ..IN1K },
    Subset { tag: "in22k", name: "ImageNet-22k (Microsoft)", classes: 21842, bit: 3, small_first: true },
    Subset { tag: "in21k", name: "ImageNet-21k (Google)", classes: 21843, bit: 4, ..IN1K },
    Subset { tag: "in21k", name: "ImageNet-21k (MIIL)", classes: 11221, bit: 5, ..IN1K },
    Subset { tag: "in21k", name: "ImageNet-21k (MIIL, winter 2021)", classes: 10450, bit: 6, ..IN1K },
];

impl Subset {
    /// The subset on which a checkpoint with timm's tag was trained last: `augreg_in21k_ft_in1k` is ImageNet-1k. `None` if the
    /// tag names none, or one with another number of classes.
    pub fn of_tag(tag: &str, classes: usize) -> Option<Self> {
        let last = tag.split(['_', '.', '-']).rev().find(|part| SUBSETS.iter().any(|subset| subset.tag == *part))?;
        // in BEiT's and MIIL's tags 21k and 22k are the same thing
        let alike = |subset: &Subset| {
            subset.tag == last || (last != IN1K.tag && subset.classes > 20_000 && last.starts_with("in2"))
        };
        SUBSETS.into_iter().find(|subset| subset.classes == classes && alike(subset))
    }

    /// The names of its classes, in class order.
    pub fn labels(self) -> Vec<String> {
        let text = text();
        let (mut first, mut rest) = (Vec::new(), Vec::new());
        for (_, subsets, word) in lines(&text) {
            let has = |subset: Self| subsets.checked_shr(subset.bit).is_some_and(|bits| bits & 1 == 1);
            if has(self) {
                if self.small_first && has(IN1K) { first.push(word.to_owned()) } else { rest.push(word.to_owned()) }
            }
        }
        first.append(&mut rest);
        first
    }
}

/// The words of synsets' numbers such as `n01440764`, if all of `names` are such numbers.
pub fn words(names: &[String]) -> Option<Vec<String>> {
    if names.is_empty() || !names.iter().all(|name| is_synset(name)) {
        return None;
    }
    let text = text();
    let words: std::collections::HashMap<&str, &str> = lines(&text).map(|(synset, _, word)| (synset, word)).collect();
    names.iter().map(|name| words.get(name.as_str()).map(|&word| word.to_owned())).collect()
}

/// Whether a label is a synset number such as `n01440764`.
pub fn is_synset(name: &str) -> bool {
    name.len() == 9 && name.strip_prefix('n').is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
}

/// `SYNSETS`, unpacked.
fn text() -> String {
    let mut text = String::new();
    // the data are part of the program; a test reads them
    let read = GzDecoder::new(SYNSETS).read_to_string(&mut text);
    debug_assert!(read.is_ok());
    text
}

/// A synset, the subsets that contain it, and its word.
fn lines(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split('\t');
        let (synset, subsets, word) = (fields.next()?, fields.next()?, fields.next()?);
        Some((synset, u32::from_str_radix(subsets, 16).ok()?, word))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn every_subset_has_its_classes() {
        for subset in SUBSETS {
            let labels = subset.labels();
            assert_eq!(labels.len(), subset.classes, "{}", subset.name);
            assert!(labels.iter().all(|label| !label.is_empty()));
        }
        let labels = IN1K.labels();
        // the first and the last, and two that are known from everywhere
        assert_eq!(
            [0, 281, 285, 999].map(|class| &*labels[class]),
            ["tench", "tabby", "Egyptian cat", "toilet tissue"]
        );
        // in Microsoft's order these come first, too
        assert_eq!(Subset::of_tag("ms_in22k", 21842).unwrap().labels()[..1000], labels);
        assert_eq!(Subset::of_tag("orig_in21k", 21843).unwrap().labels()[0], "organism");
    }

    #[test]
    fn the_tag_says_the_subset() {
        let name = |tag: &str, classes: usize| Subset::of_tag(tag, classes).map(|subset| subset.name);
        assert_eq!(name("augreg_in21k_ft_in1k", 1000), Some("ImageNet-1k"));
        assert_eq!(name("openai_ft_in12k_in1k", 1000), Some("ImageNet-1k"));
        assert_eq!(name("laion2b_ft_in12k", 11821), Some("ImageNet-12k"));
        assert_eq!(name("augreg_in21k", 21843), Some("ImageNet-21k (Google)"));
        assert_eq!(name("microsoft_in22k_ft_in22k", 21841), Some("ImageNet-22k"));
        assert_eq!(name("miil_in21k", 11221), Some("ImageNet-21k (MIIL)"));
        // a head of one's own on such a model, or no class names at all
        for (tag, classes) in [("augreg_in21k_ft_in1k", 5), ("lvd142m", 1000), ("", 1000), ("in1k", 21843)] {
            assert_eq!(name(tag, classes), None, "{tag} {classes}");
        }
    }

    #[test]
    fn numbers_of_synsets_become_words() {
        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(words(&names(&["n01440764", "n02123045"])), Some(names(&["tench", "tabby"])));
        assert_eq!(words(&names(&["n01440764", "cat"])), None);
        assert_eq!(words(&names(&["n99999999"])), None);
        assert_eq!(words(&[]), None);
    }
}

//! timm's architecture names → [`Config`](crate::Config). A `config.json` on the Hub names the architecture and leaves
//! most of its switches out, so they are listed here, in one table per file of timm 1.0.31.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

mod beit;
mod deit;
mod eva;
mod family;
mod vision_transformer;

pub use self::family::Architecture;
pub(crate) use self::family::Class;
use self::family::{Family, Row};

/// Every family, table by table.
fn families() -> impl Iterator<Item = &'static Family> {
    [vision_transformer::FAMILIES, deit::FAMILIES, eva::FAMILIES, beit::FAMILIES].into_iter().flatten()
}

/// Every name with its family.
fn rows() -> impl Iterator<Item = (&'static Family, &'static Row)> {
    families().flat_map(|family| family.rows.iter().map(move |row| (family, row)))
}

impl Architecture {
    /// The architecture of a name, with or without a tag (`vit_base_patch16_224.augreg_in1k`).
    pub fn of(name: &str) -> Option<Self> {
        let name = name.split_once('.').map_or(name, |(name, _)| name);
        rows().find(|(_, row)| row.0 == name).map(|(family, row)| family.member(row))
    }
}

/// Every name, sorted.
pub fn all() -> Vec<&'static str> {
    let mut names: Vec<_> = rows().map(|(_, row)| row.0).collect();
    names.sort_unstable();
    names
}

/// The known name that shares the longest prefix with an unknown one.
pub(crate) fn nearest(name: &str) -> Option<&'static str> {
    let shared = |known: &str| known.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    all().into_iter().max_by_key(|known| shared(known)).filter(|known| shared(known) >= 8)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::{Architecture, all};
    use crate::layers::parameters;

    #[test]
    fn every_name_has_timms_parameters() {
        let table = include_str!("../../tests/fixtures/timm_names.tsv");
        let mut names = Vec::new();
        for line in table.lines().filter(|line| !line.starts_with('#')) {
            let [name, count, tensors] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
            let shapes = parameters(&Architecture::of(name).expect(name).config).expect(name);
            let found: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
            assert_eq!((found, shapes.len()), (count.parse().unwrap(), tensors.parse().unwrap()), "{name}");
            names.push(name);
        }
        assert_eq!(names, all());
    }

    #[test]
    fn a_tag_is_no_part_of_the_name() {
        let tagged = Architecture::of("vit_tiny_patch16_224.augreg_in21k_ft_in1k").unwrap();
        assert_eq!(tagged.config, Architecture::of("vit_tiny_patch16_224").unwrap().config);
        assert!(Architecture::of("vit_tiny_patch16_225").is_none());
    }
}

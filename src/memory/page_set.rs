//! A set of guest pages, one bit each.

/// A set of page numbers below a limit given at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set for the pages `0..pages`.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// The limit given at the start: every page in the set is below it.
    pub fn limit(&self) -> u64 {
        self.pages
    }

    /// Adds one page.
    ///
    /// # Panics
    /// When the page is not below the limit.
    pub fn insert(&mut self, page: u64) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[(page / 64) as usize] |= 1 << (page % 64);
    }

    /// Adds the pages `from..to`.
    ///
    /// # Panics
    /// When one of them is not below the limit.
    pub fn insert_range(&mut self, from: u64, to: u64) {
        assert!(from <= to && to <= self.pages, "pages {from}..{to} of {}", self.pages);
        let mut page = from;
        while page < to {
            let end = to.min((page / 64 + 1) * 64);
            let ones = u64::MAX >> (64 - (end - page));
            self.words[(page / 64) as usize] |= ones << (page % 64);
            page = end;
        }
    }

    /// Adds 64 pages at once: bit b of `bits` stands for page `word * 64 + b`. Bits past the limit are ignored.
    pub fn insert_word(&mut self, word: u64, bits: u64) {
        let valid = match self.pages.saturating_sub(word * 64) {
            0 => return,
            left if left >= 64 => u64::MAX,
            left => (1 << left) - 1,
        };
        self.words[word as usize] |= bits & valid;
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Adds every page of `other`.
    ///
    /// # Panics
    /// When the limits differ.
    pub fn union(&mut self, other: &PageSet) {
        assert_eq!(self.pages, other.pages);
        for (ours, theirs) in self.words.iter_mut().zip(&other.words) {
            *ours |= theirs;
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many pages are in the set.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                if left == 0 {
                    return None;
                }
                let bit = left.trailing_zeros();
                left &= left - 1;
                Some(index as u64 * 64 + u64::from(bit))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(
            single in prop::collection::vec(0u64..300, 0..40),
            ranges in prop::collection::vec((0u64..300, 0u64..100), 0..5),
            word in (0u64..8, any::<u64>()),
        ) {
            let mut set = PageSet::new(300);
            let mut model = BTreeSet::new();
            for page in single {
                set.insert(page);
                model.insert(page);
            }
            for (from, len) in ranges {
                let to = (from + len).min(300);
                set.insert_range(from, to);
                model.extend(from..to);
            }
            set.insert_word(word.0, word.1);
            model.extend((0..64).filter(|bit| word.1 >> bit & 1 == 1).map(|bit| word.0 * 64 + bit).filter(|page| *page < 300));
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert!((0..310).all(|page| set.contains(page) == model.contains(&page)));
            let mut twice = PageSet::new(300);
            twice.union(&set);
            prop_assert_eq!(&twice, &set);
            twice.clear();
            prop_assert!(twice.is_empty());
        }
    }
}

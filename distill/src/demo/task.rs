//! Task of the demo: a few records, then a question. The answer is built from the records, item by item.
//!
//! ```text
//! kim : molde , nurse , mice , 16 . ...        (name : town , job , pet , age)
//! list everyone by pet ?                -> mice kim 16 , ... .
//! list everyone by job ?                -> nurse kim 16 , ... .
//! what country is everyone from ?       -> kim norway , ... .      (the weights know the country)
//! list everyone backwards ?             -> kim nurse , ... .       (the last record first)
//! describe everyone ?                   -> kim the nurse from norway , age 16 , ... .
//! ```

use crate::random::Random;

const NAMES: [&str; 24] = [
    "kim", "ana", "ben", "lou", "max", "eva", "tom", "ida", "leo", "mia", "jan", "zoe", "sam", "amy", "rob", "una",
    "ned", "liv", "gus", "fay", "hal", "joy", "pia", "ray",
];
const JOBS: [&str; 12] =
    ["nurse", "baker", "pilot", "judge", "tailor", "miner", "clerk", "farmer", "cook", "painter", "sailor", "teacher"];
const PETS: [&str; 10] = ["mice", "dog", "cat", "parrot", "snake", "rabbit", "goat", "horse", "turtle", "fish"];
const COUNTRIES: [(&str, [&str; 3]); 6] = [
    ("norway", ["molde", "bergen", "tromso"]),
    ("italy", ["turin", "siena", "parma"]),
    ("japan", ["osaka", "kyoto", "nara"]),
    ("peru", ["lima", "cusco", "tacna"]),
    ("ghana", ["accra", "kumasi", "tamale"]),
    ("canada", ["regina", "laval", "surrey"]),
];
const AGES: usize = 20;
const OTHER: [&str; 17] = [
    ":",
    ",",
    ".",
    "?",
    "list",
    "everyone",
    "by",
    "pet",
    "job",
    "what",
    "country",
    "is",
    "from",
    "backwards",
    "describe",
    "the",
    "age",
];

/// Returns every word of the task, in the order of the token ids.
pub fn words() -> Vec<String> {
    let towns = COUNTRIES.iter().flat_map(|(country, towns)| towns.iter().chain([country]));
    let fixed = OTHER.iter().chain(&NAMES).chain(&JOBS).chain(&PETS).chain(towns).map(|w| (*w).to_string());
    fixed.chain((1..=AGES).map(|age| age.to_string())).collect()
}

/// A person: one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Person {
    name: &'static str,
    country: &'static str,
    town: &'static str,
    job: &'static str,
    pet: &'static str,
    age: usize,
}

/// Question about the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Answer: pet, name, age.
    ByPet,
    /// Answer: job, name, age.
    ByJob,
    /// Answer: name, country.
    Country,
    /// Answer: name, job, in reverse order of the records.
    Backwards,
    /// Answer: name, job, country and age in words.
    Describe,
}

impl Question {
    /// All questions.
    pub const ALL: [Self; 5] = [Self::ByPet, Self::ByJob, Self::Country, Self::Backwards, Self::Describe];

    /// Text of the question.
    pub fn text(self) -> &'static str {
        match self {
            Self::ByPet => "list everyone by pet ?",
            Self::ByJob => "list everyone by job ?",
            Self::Country => "what country is everyone from ?",
            Self::Backwards => "list everyone backwards ?",
            Self::Describe => "describe everyone ?",
        }
    }

    /// Returns the correct answer.
    pub fn answer(self, people: &[Person]) -> String {
        let item = |p: &Person| match self {
            Self::ByPet => format!("{} {} {}", p.pet, p.name, p.age),
            Self::ByJob => format!("{} {} {}", p.job, p.name, p.age),
            Self::Country => format!("{} {}", p.name, p.country),
            Self::Backwards => format!("{} {}", p.name, p.job),
            Self::Describe => format!("{} the {} from {} , age {}", p.name, p.job, p.country, p.age),
        };
        let mut items: Vec<String> = people.iter().map(item).collect();
        if self == Self::Backwards {
            items.reverse();
        }
        format!("{} .", items.join(" , "))
    }
}

/// Partition of all documents. The two splits never share a document, whatever the seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Fifteen sixteenths of all documents.
    Train,
    /// The remaining sixteenth.
    HeldOut,
}

/// Formats the records as text.
pub fn records(people: &[Person]) -> String {
    let record = |p: &Person| format!("{} : {} , {} , {} , {} .", p.name, p.town, p.job, p.pet, p.age);
    people.iter().map(record).collect::<Vec<_>>().join(" ")
}

/// Draws a group of `count` people from a split.
pub fn people(random: &mut Random, split: Split, count: usize) -> Vec<Person> {
    loop {
        let names = random.choose(&NAMES, count);
        // Jobs and pets differ within a group, so that a wrong answer is never correct by chance.
        let (jobs, pets) = (random.choose(&JOBS, count), random.choose(&PETS, count));
        let person = |i: usize, random: &mut Random| {
            let (country, towns) = COUNTRIES[random.below(COUNTRIES.len())];
            let town = towns[random.below(towns.len())];
            Person { name: names[i], country, town, job: jobs[i], pet: pets[i], age: 1 + random.below(AGES) }
        };
        let group: Vec<Person> = (0..count).map(|i| person(i, random)).collect();
        let held_out = Random::new(0, &records(&group)).below(16) == 0;
        if held_out == (split == Split::HeldOut) {
            return group;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_follow_the_records() {
        let kim = Person { name: "kim", country: "norway", town: "molde", job: "nurse", pet: "mice", age: 16 };
        let ana = Person { name: "ana", country: "peru", town: "lima", job: "baker", pet: "dog", age: 3 };
        let group = [kim, ana];
        assert_eq!(records(&group), "kim : molde , nurse , mice , 16 . ana : lima , baker , dog , 3 .");
        let answers = Question::ALL.map(|q| q.answer(&group));
        assert_eq!(answers[0], "mice kim 16 , dog ana 3 .");
        assert_eq!(answers[1], "nurse kim 16 , baker ana 3 .");
        assert_eq!(answers[2], "kim norway , ana peru .");
        assert_eq!(answers[3], "ana baker , kim nurse .");
        assert_eq!(answers[4], "kim the nurse from norway , age 16 , ana the baker from peru , age 3 .");
    }

    #[test]
    fn splits_share_no_document_and_seeds_reproduce() {
        let draw = |split, seed| {
            let mut random = Random::new(seed, "test");
            (0..300).map(|_| records(&people(&mut random, split, 1))).collect::<Vec<_>>()
        };
        let train = draw(Split::Train, 1);
        assert_eq!(train, draw(Split::Train, 1));
        assert!(draw(Split::HeldOut, 1).iter().all(|doc| !train.contains(doc)));
    }

    #[test]
    fn every_word_is_known_once() {
        let words = words();
        let mut random = Random::new(3, "words");
        for _ in 0..200 {
            let group = people(&mut random, Split::Train, 4);
            let mut text = records(&group);
            for q in Question::ALL {
                text += &format!(" {} {}", q.text(), q.answer(&group));
            }
            assert!(text.split(' ').all(|w| words.iter().any(|known| known == w)), "{text}");
        }
        let mut sorted = words.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), words.len());
    }
}

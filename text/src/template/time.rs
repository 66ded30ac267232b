//! The template function `strftime_now`.

use std::time::SystemTime;

/// Python's `strftime` in UTC, for the directives that templates use. Unknown directives are copied.
pub(super) fn strftime(format: &str, now: SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let hour = second_of_day / 3600;
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('e') => out += &format!("{day:2}"),
            Some('j') => out += &format!("{:03}", days - first_of(year) + 1),
            Some('I') => out += &format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('T') => out += &strftime("%H:%M:%S", now),
            Some('R') => out += &strftime("%H:%M", now),
            Some('D' | 'x') => out += &strftime("%m/%d/%y", now),
            Some('X') => out += &strftime("%H:%M:%S", now),
            Some('c') => out += &strftime("%a %b %e %H:%M:%S %Y", now),
            Some('h') => out += &month_name[..3],
            Some('u') => out += &((days + 3) % 7 + 1).to_string(),
            Some('w') => out += &((days + 4) % 7).to_string(),
            Some('s') => out += &seconds.to_string(),
            Some('f') => {
                out += &format!("{:06}", now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.subsec_micros()))
            }
            // Empty, as for a Python datetime without a time zone.
            Some('z' | 'Z') => {}
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            // glibc's extension: no leading zeros or spaces.
            Some('-') => match chars.next() {
                Some(directive) => {
                    let padded = strftime(&format!("%{directive}"), now);
                    let short = padded.trim_start_matches(['0', ' ']);
                    out += if short.is_empty() { "0" } else { short };
                }
                None => out += "%-",
            },
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{:02}", second_of_day / 60 % 60),
            Some('S') => out += &format!("{:02}", second_of_day % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Days from 1970-01-01 to January 1 of `year`.
fn first_of(year: u64) -> u64 {
    let before = year - 1;
    before * 365 + before / 4 - before / 100 + before / 400 - 719_162
}

/// Converts days since 1970-01-01 to (year, month, day), after Howard Hinnant's `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_210_096);
        assert_eq!(strftime("%d %b %Y %A %H:%M:%S %%", at), "29 Feb 2024 Thursday 12:34:56 %");
        assert_eq!(strftime("%F %T %j %-d %-m %I:%M %p %u %w %e", at), "2024-02-29 12:34:56 060 29 2 12:34 PM 4 4 29");
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_693_445);
        assert_eq!(strftime("%j %-d %-I %-H %p %D %c", at), "001 1 1 1 AM 01/01/25 Wed Jan  1 01:04:05 2025");
    }
}

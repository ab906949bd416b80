//! Bar charts, as SVG.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::series::{DIRECT, Figures, Plot, Series, figure};

/// File, title, what the axis shows, of each plot.
const PLOTS: [(Plot, &str, &str, &str); 4] = [
    (Plot::Bulk, "bulk", "TCP bulk transfers", "Gbit/s"),
    (Plot::Connections, "connections", "TCP connections and requests a second", RELATIVE),
    (Plot::Latency, "latency", "TCP latency, one at a time", "µs"),
    (Plot::Udp, "udp", "UDP datagrams a second", RELATIVE),
];

/// Where things of several kinds are beside each other.
const RELATIVE: &str = "of direct forwarding";

const SIZE: (u32, u32) = (960, 420);

/// Room for the names of the candidates.
const LEGEND: u32 = 170;

/// Colours that are told apart with any kind of colour vision (Okabe and Ito), grey for the limit.
const COLOURS: [(&str, RGBColor); 8] = [
    ("direct", RGBColor(150, 150, 150)),
    ("ebpf", RGBColor(213, 94, 0)),
    ("iptables", RGBColor(230, 159, 0)),
    ("haproxy", RGBColor(0, 114, 178)),
    ("nginx", RGBColor(0, 158, 115)),
    ("redsocks", RGBColor(204, 121, 167)),
    ("v2ray", RGBColor(86, 180, 233)),
    ("shadowsocks", RGBColor(0, 0, 0)),
];

/// Height of a bar, and of the ends of its whisker.
struct Bar {
    height: f64,
    whisker: Option<(f64, f64)>,
}

/// Draws those plots that there is something for; gives their files.
pub(crate) fn draw(directory: &Path, all: &[Series]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for (plot, file, title, axis) in PLOTS {
        let groups: Vec<&Series> = all.iter().filter(|series| series.metric.plot == Some(plot)).collect();
        if groups.is_empty() {
            continue;
        }
        let path = directory.join(format!("{file}.svg"));
        chart(&path, title, axis, &groups, axis == RELATIVE)
            .map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))?;
        files.push(path);
    }
    Ok(files)
}

fn bar(series: &Series, figures: &Figures, relative: bool) -> Option<Bar> {
    if relative {
        return Some(Bar { height: series.ratio(figures, DIRECT)?, whisker: None });
    }
    let spread = figures.spread()?;
    Some(Bar { height: spread.median, whisker: Some((spread.least, spread.most)) })
}

/// A group of bars for each series, a bar for each candidate.
fn chart(
    path: &Path,
    title: &str,
    axis: &str,
    groups: &[&Series],
    relative: bool,
) -> Result<(), Box<dyn std::error::Error>> {
    let bars = |key: &str| -> Vec<Option<Bar>> {
        let of = |series: &&Series| {
            let figures = series.figures.iter().find(|figures| figures.key == key)?;
            bar(series, figures, relative)
        };
        groups.iter().map(of).collect()
    };
    let candidates: Vec<(&str, RGBColor, Vec<Option<Bar>>)> = COLOURS
        .iter()
        .filter_map(|(key, colour)| {
            let name =
                groups.iter().flat_map(|series| &series.figures).find(|figures| figures.key == *key)?;
            Some((name.name.as_str(), *colour, bars(key)))
        })
        .collect();
    let heights = candidates.iter().flat_map(|(_, _, bars)| bars).flatten();
    let top = heights.map(|bar| bar.whisker.map_or(bar.height, |(_, most)| most)).fold(0.0, f64::max);

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .margin_right(LEGEND)
        .x_label_area_size(56)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..ordinal(groups.len()), 0.0..top * 1.05)?;
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().disable_x_axis().max_light_lines(1);
    mesh.y_desc(axis).y_label_formatter(&|height| figure(*height)).draw()?;
    let width = 0.84 / ordinal(candidates.len());
    for (place, (name, colour, bars)) in candidates.iter().enumerate() {
        let left = |group: usize| ordinal(group) + 0.08 + width * ordinal(place);
        let boxes = bars.iter().enumerate().filter_map(|(group, bar)| {
            let left = left(group);
            let corners = [(left, 0.0), (left + width * 0.92, bar.as_ref()?.height)];
            Some(Rectangle::new(corners, colour.filled()))
        });
        chart.draw_series(boxes)?;
        let whiskers = bars.iter().enumerate().filter_map(|(group, bar)| {
            let (least, most) = bar.as_ref()?.whisker?;
            let middle = left(group) + width * 0.46;
            Some(PathElement::new([(middle, least), (middle, most)], RGBColor(90, 90, 90)))
        });
        chart.draw_series(whiskers)?;
        let row = 48 + 20 * i32::try_from(place)?;
        let right = i32::try_from(SIZE.0 - LEGEND)? + 12;
        root.draw(&Rectangle::new([(right, row), (right + 12, row + 12)], colour.filled()))?;
        write(&root, name, (right + 18, row + 6), HPos::Left)?;
    }
    for (group, series) in groups.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(ordinal(group) + 0.5, 0.0));
        let label = if relative || groups.iter().all(|other| other.metric.name == series.metric.name) {
            series.title.clone()
        } else {
            format!("{}, {}", series.title, series.metric.name)
        };
        for (line, part) in label.split(", ").enumerate() {
            write(&root, part, (x, y + 12 + 14 * i32::try_from(line)?), HPos::Center)?;
        }
    }
    root.present()?;
    Ok(())
}

fn write<DB: DrawingBackend>(
    root: &DrawingArea<DB, plotters::coord::Shift>,
    text: impl Display,
    at: (i32, i32),
    side: HPos,
) -> Result<(), Box<dyn std::error::Error>>
where
    DB::ErrorType: 'static,
{
    let style = TextStyle::from(("sans-serif", 12).into_font()).pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(text.to_string(), at, style))?;
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a few bars")]
fn ordinal(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::super::series::Better;
    use super::super::series::tests::series;
    use super::*;

    #[test]
    fn a_bar_for_each_candidate_that_has_figures() {
        let directory = std::env::temp_dir().join(format!("tproxy-plots-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let mut drawn = series(Better::More, &[]);
        drawn.metric.plot = Some(Plot::Bulk);
        let files = draw(&directory, &[drawn]).expect("a plot");
        assert_eq!(files, [directory.join("bulk.svg")]);
        let svg = std::fs::read_to_string(&files[0]).expect("a file");
        std::fs::remove_dir_all(&directory).expect("removed");
        // Those of known keys, with their whiskers.
        for colour in ["#969696", "#D55E00"] {
            assert_eq!(svg.matches(&format!("fill=\"{colour}\"")).count(), 2, "bar and legend: {svg}");
        }
        assert!(svg.contains("a case") && svg.contains("Gbit/s"), "{svg}");
    }
}

//! Plots, as SVG.
//!
//! Knows how numbers become a picture. Must not know what they mean. The invariant it keeps:
//! the same numbers give the same bytes, so that a page in the repository changes only when a
//! figure does.

use std::error::Error;
use std::ops::Range;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub(super) type Picture = Result<String, Box<dyn Error>>;

/// A line of a plot.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) name: String,
    /// Which of the colours: the same thing has the same one in every plot.
    pub(super) color: usize,
    pub(super) points: Vec<(f64, f64)>,
}

/// A row of a plot: a value with the range it was found in, and where it has to be.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) value: f64,
    pub(super) range: Option<(f64, f64)>,
    pub(super) goal: Option<f64>,
}

/// What a plot says about itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Labels<'a> {
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    /// Whether the upright axis shows log2(1 + y), which has room for 0, 1 and 300.
    pub(super) is_logarithmic: bool,
}

/// Draws lines over one another.
pub(super) fn lines(labels: Labels<'_>, series: &[Series]) -> Picture {
    let scaled = |point: &(f64, f64)| (point.0, if labels.is_logarithmic { (1.0 + point.1).log2() } else { point.1 });
    let all = || series.iter().flat_map(|series| &series.points).map(scaled);
    let x = padded(all().map(|point| point.0), 0.02);
    let y = padded(all().map(|point| point.1).chain([0.0]), 0.06);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, 360)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .margin_right(LEGEND)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)?;
        let value = |y: &f64| if labels.is_logarithmic { format!("{:.0}", y.exp2() - 1.0) } else { format!("{y:.0}") };
        (chart.configure_mesh())
            .max_light_lines(0)
            .bold_line_style(GRID)
            .axis_style(INK.stroke_width(1))
            .label_style((FONT, 13).into_font().color(&INK))
            .axis_desc_style((FONT, 14).into_font().color(&INK))
            .x_desc(labels.x)
            .y_desc(labels.y)
            .x_label_formatter(&|x| format!("{}", (x * 100.0).round() / 100.0))
            .y_label_formatter(&value)
            .draw()?;
        let names = TextStyle::from((FONT, 13).into_font()).color(&INK).pos(Pos::new(HPos::Left, VPos::Center));
        for (number, series) in series.iter().enumerate() {
            let color = COLORS[series.color % COLORS.len()];
            chart.draw_series(LineSeries::new(series.points.iter().map(scaled), color.stroke_width(2)))?;
            chart.draw_series(series.points.iter().map(|point| Circle::new(scaled(point), 3, color.filled())))?;
            let (left, y) = ((WIDTH - LEGEND) as i32 + 12, 24 + 22 * number as i32);
            area.draw(&PathElement::new([(left, y), (left + 18, y)], color.stroke_width(3)))?;
            area.draw_text(&series.name, &names, (left + 24, y))?;
        }
        area.present()?;
    }
    Ok(svg)
}

/// Draws one row under another: a dot for the value, a line for its range, a tick for its goal.
pub(super) fn rows(label: &str, within: Range<f64>, rows: &[Row]) -> Picture {
    let height = 20 * rows.len() as u32 + 70;
    let count = rows.len() as f64;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(250)
            .build_cartesian_2d(within.clone(), count..0.0)?;
        (chart.configure_mesh())
            .disable_y_mesh()
            .max_light_lines(0)
            .bold_line_style(GRID)
            .axis_style(INK.stroke_width(1))
            .label_style((FONT, 13).into_font().color(&INK))
            .axis_desc_style((FONT, 14).into_font().color(&INK))
            .y_labels(0)
            .x_desc(label)
            .draw()?;
        let inside = |value: f64| value.clamp(within.start, within.end);
        for (number, row) in rows.iter().enumerate() {
            let y = number as f64 + 0.5;
            let misses = row.goal.is_some_and(|goal| row.value < goal);
            let color = if misses { COLORS[0] } else { COLORS[3] };
            if let Some((least, most)) = row.range {
                let line = [(inside(least), y), (inside(most), y)];
                chart.draw_series([PathElement::new(line, color.mix(0.45).stroke_width(3))])?;
            }
            if let Some(goal) = row.goal {
                let tick = [(inside(goal), y - 0.4), (inside(goal), y + 0.4)];
                chart.draw_series([PathElement::new(tick, INK.stroke_width(2))])?;
            }
            chart.draw_series([Circle::new((inside(row.value), y), 4, color.filled())])?;
        }
        let names = TextStyle::from((FONT, 13).into_font()).color(&INK).pos(Pos::new(HPos::Right, VPos::Center));
        for (number, row) in rows.iter().enumerate() {
            let (_, y) = chart.backend_coord(&(within.start, number as f64 + 0.5));
            area.draw_text(&row.name, &names, (250, y))?;
        }
        area.present()?;
    }
    Ok(svg)
}

/// Returns what spans all values and a little more.
fn padded(values: impl Iterator<Item = f64>, more: f64) -> Range<f64> {
    let (least, most) = values.fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(value), most.max(value)));
    if least > most {
        return 0.0..1.0;
    }
    let pad = ((most - least) * more).max(1e-3);
    least - pad..most + pad
}

const WIDTH: u32 = 860;
/// The room for names on the right of a plot.
const LEGEND: u32 = 170;
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(40, 44, 52);
const GRID: RGBColor = RGBColor(226, 228, 232);

/// Okabe and Ito's colours, which people with any colour vision can tell apart
/// (<https://jfly.uni-koeln.de/color/>).
const COLORS: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];

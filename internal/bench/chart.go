package main

import (
	"fmt"
	"math"
	"strings"
)

// Colours that can be told from white and from black.
const (
	ink   = "#7a7f87" // text and axes
	faint = "#7a7f8755"
)

var callColours = map[call]string{cachedGet: "#2f81f7", verifyToken: "#2da44e", coldGet: "#d9730d", put: "#a855f7"}

const memoryColour = "#d6456b"

// axis puts values to pixels.
type axis struct {
	from, to float64 // values
	low, end float64 // pixels
	log      bool
	ticks    []float64
}

func (a axis) at(value float64) float64 {
	from, to := a.from, a.to
	if a.log {
		from, to, value = math.Log(from), math.Log(to), math.Log(value)
	}
	return a.low + (value-from)/(to-from)*(a.end-a.low)
}

// logAxis has ticks at 1, 2 and 5 and their powers of ten, and begins and ends
// with one.
func logAxis(values []float64, low, end float64) axis {
	s := spreadOf(values)
	a := axis{low: low, end: end, log: true}
	last := 0.0
	for power := math.Floor(math.Log10(s.Min)); ; power++ {
		for _, digit := range []float64{1, 2, 5} {
			tick := digit * math.Pow(10, power)
			if tick <= s.Min {
				a.ticks = a.ticks[:0] // it may begin here
			}
			a.ticks = append(a.ticks, tick)
			if last = tick; last > s.Max {
				a.from, a.to = a.ticks[0], last
				return a
			}
		}
	}
}

// linearAxis begins at 0 and has about five ticks.
func linearAxis(most, low, end float64) axis {
	step := math.Pow(10, math.Floor(math.Log10(most/2)))
	for most/step > 6 {
		step *= 2
	}
	a := axis{low: low, end: end}
	for a.to = 0; ; a.to += step {
		a.ticks = append(a.ticks, a.to)
		if a.to > most {
			return a
		}
	}
}

// drawing is an SVG in the making.
type drawing struct{ strings.Builder }

func (d *drawing) line(x1, y1, x2, y2 float64, colour string) {
	fmt.Fprintf(d, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`+"\n", x1, y1, x2, y2, colour)
}

func (d *drawing) label(x, y float64, anchor, text, colour string) {
	fmt.Fprintf(d, `<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s">%s</text>`+"\n", x, y, anchor, colour, text)
}

// upright is a label beside an axis that goes up.
func (d *drawing) upright(x, y float64, text, colour string) {
	fmt.Fprintf(d, `<text transform="translate(%.1f %.1f) rotate(-90)" text-anchor="middle" fill="%s">%s</text>`+"\n", x, y, colour, text)
}

// curve is a line with a dot for each value; dash is empty for one that is whole.
func (d *drawing) curve(x, y axis, points [][2]float64, colour, dash string) {
	var path []string
	for _, p := range points {
		path = append(path, fmt.Sprintf("%.1f,%.1f", x.at(p[0]), y.at(p[1])))
	}
	fmt.Fprintf(d, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2" stroke-dasharray="%s"/>`+"\n", strings.Join(path, " "), colour, dash)
	for _, p := range points {
		fmt.Fprintf(d, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", x.at(p[0]), y.at(p[1]), colour)
	}
}

// legend names the curves, from x on in one line.
func (d *drawing) legend(x, y float64, entries [][2]string) {
	for _, e := range entries {
		fmt.Fprintf(d, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>`+"\n", x, y-4, e[1])
		d.label(x+9, y, "start", e[0], ink)
		x += 26 + 6.6*float64(len(e[0]))
	}
}

// Where things are. A panel's plot is between left and left+plotWidth, top and
// bottom.
const (
	chartWidth, chartHeight = 960, 400
	plotWidth               = 340.0
	top, bottom             = 50.0, 300.0
	leftPanel, rightPanel   = 70.0, 540.0
)

// frame draws a panel without its curves.
func (d *drawing) frame(title string, x, y axis, xName, yName string) {
	d.label(x.low, top-24, "start", title, ink)
	for _, tick := range y.ticks {
		d.line(x.low, y.at(tick), x.end, y.at(tick), faint)
		d.label(x.low-8, y.at(tick)+4, "end", fmt.Sprintf("%g", tick), ink)
	}
	for _, tick := range x.ticks {
		d.line(x.at(tick), bottom, x.at(tick), bottom+5, ink)
		d.label(x.at(tick), bottom+20, "middle", count(int(tick)), ink)
	}
	d.line(x.low, bottom, x.end, bottom, ink)
	d.label((x.low+x.end)/2, bottom+42, "middle", xName, ink)
	d.upright(x.low-46, (top+bottom)/2, yName, ink)
}

// chart is performance.svg: what calls cost beside the floor, and what a store's
// size costs.
func (r *report) chart() []byte {
	d := &drawing{}
	fmt.Fprintf(d, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" font-family="system-ui, sans-serif" font-size="12">`+"\n",
		chartWidth, chartHeight)
	r.drawCalls(d)
	r.drawSizes(d)
	d.WriteString("</svg>\n")
	return []byte(d.String())
}

func (r *report) drawCalls(d *drawing) {
	curves, all := map[call][][2]float64{}, []float64{1}
	for _, c := range r.calls {
		cost := ratios(c.rounds, cpu).Median
		curves[c.call] = append(curves[c.call], [2]float64{float64(c.callers), cost})
		all = append(all, cost)
	}
	x := axis{from: float64(callerCounts[0]), to: float64(callerCounts[len(callerCounts)-1]), low: leftPanel, end: leftPanel + plotWidth, log: true}
	for _, n := range callerCounts {
		x.ticks = append(x.ticks, float64(n))
	}
	y := logAxis(all, bottom, top)
	d.frame("Server CPU per call ÷ that of an empty gRPC server", x, y, "callers", "ratio")
	d.line(x.low, y.at(1), x.end, y.at(1), ink)
	var names [][2]string
	for _, c := range []call{cachedGet, verifyToken, coldGet, put} {
		d.curve(x, y, curves[c], callColours[c], "")
		names = append(names, [2]string{c.String(), callColours[c]})
	}
	d.legend(leftPanel, bottom+76, names)
}

func (r *report) drawSizes(d *drawing) {
	const micro, mega = 1e6, 1 << 20
	var cold, cached, held [][2]float64
	var most float64
	var sizes, memories []float64
	for _, s := range r.sizes {
		n := float64(s.secrets)
		coldCost, cachedCost, bytes := median(s.cold, cpu)*micro, median(s.cached, cpu)*micro, float64(s.afterReads.resident)/mega
		cold, cached, held = append(cold, [2]float64{n, coldCost}), append(cached, [2]float64{n, cachedCost}), append(held, [2]float64{n, bytes})
		sizes, memories, most = append(sizes, n), append(memories, bytes), max(most, coldCost, cachedCost)
	}
	x := axis{from: sizes[0], to: sizes[len(sizes)-1], low: rightPanel, end: rightPanel + plotWidth, log: true, ticks: sizes}
	y, memory := linearAxis(most, bottom, top), logAxis(memories, bottom, top)
	d.frame("Cost of a Get and memory, by the size of the store", x, y, "secrets in the store", "server CPU per Get, µs")
	for _, tick := range memory.ticks {
		d.label(x.end+8, memory.at(tick)+4, "start", fmt.Sprintf("%g", tick), memoryColour)
	}
	d.upright(x.end+56, (top+bottom)/2, "memory after reads, MiB (dashed)", memoryColour)
	d.curve(x, y, cold, callColours[coldGet], "")
	d.curve(x, y, cached, callColours[cachedGet], "")
	d.curve(x, memory, held, memoryColour, "5 4")
	d.legend(rightPanel, bottom+76, [][2]string{{"cold Get", callColours[coldGet]}, {"cached Get", callColours[cachedGet]}, {"memory", memoryColour}})
}

/**
 * What every part of the page is made of: Preact's elements and hooks, htm's templates, signals.
 *
 * Parts import from here only, so that the libraries can be exchanged in one place.
 */
import { h, render, Fragment, createRef, createContext } from "preact";
import { useEffect, useLayoutEffect, useMemo, useRef, useState, useCallback, useContext, useId } from "preact/hooks";
import { signal, computed, effect, batch, untracked, useSignal, useComputed, useSignalEffect } from "@preact/signals";
import htm from "htm";

/** @template T @typedef {import("@preact/signals").Signal<T>} Signal */
/** @template T @typedef {import("@preact/signals").ReadonlySignal<T>} ReadonlySignal */
/** @template T @typedef {import("preact").RefObject<T>} RefObject */

/** Build elements: html`<p class="quiet">${text}</p>`. */
export const html = htm.bind(h);

export {
  h,
  render,
  Fragment,
  createRef,
  createContext,
  useEffect,
  useLayoutEffect,
  useMemo,
  useRef,
  useState,
  useCallback,
  useContext,
  useId,
  signal,
  computed,
  effect,
  batch,
  untracked,
  useSignal,
  useComputed,
  useSignalEffect,
};
